"""Building blocks of Pallas kernels for Hopper GPUs (Mosaic GPU).

A program is one warpgroup, or several that share its rows. They multiply tiles
of shared memory, or an operand in registers by one of shared memory, on tensor
cores; sums are float32.
"""

from collections.abc import Callable
import inspect
import math
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

# Weights of the approximation 7.1.26 of Abramowitz and Stegun.
_ERF_SCALE = 0.3275911
_ERF = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)


def by_row(vector, shape):
  """Broadcasts a vector [m] to a matrix [m, n]."""
  return jax.lax.broadcast_in_dim(vector, shape, (0,))


def by_column(vector, shape):
  """Broadcasts a vector [n] to a matrix [m, n]."""
  return jax.lax.broadcast_in_dim(vector, shape, (1,))


# Layouts of vectors with an element for each row, or column, of a matrix.
ROW = plgpu.Layout.WGMMA.reduce(1)
COLUMN = plgpu.Layout.WGMMA.reduce(0)


def _transforms(width):
  """Returns the layout of operands of tensor cores, for bfloat16."""
  width = math.gcd(width, 64)
  transforms: Any = plgpu
  tiling = transforms.TilingTransform((8, width))
  return tiling, transforms.SwizzleTransform(2 * width)


def largest_divisor(number: int, most: int) -> int:
  """Returns the largest divisor of `number` that is at most `most`, or 1."""
  return next(n for n in range(max(1, most), 0, -1) if number % n == 0)


def tile(rows, channels, width=64, buffers=()):
  """Returns an operand of tensor cores in shared memory, bfloat16.

  Both operands of a product need the same `width`, which divides their columns
  and the number of products that are summed: 16, 32 or 64. `buffers` are axes
  of several operands.
  """
  shape = *buffers, rows, channels
  transforms = _transforms(math.gcd(width, channels))
  return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)


def vector(size):
  """Returns a float32 vector in shared memory."""
  return plgpu.SMEM((size,), jnp.float32)


def tile_spec(shape, index_map, width=64):
  """Returns the blocks of a pipeline that are operands of tensor cores."""
  transforms = _transforms(math.gcd(width, shape[-1]))
  return plgpu.BlockSpec(shape, index_map, transforms=transforms)


def vector_spec(size):
  """Returns the blocks of a pipeline of a vector."""
  return plgpu.BlockSpec((size,), lambda i: (i,))


def product(a, b) -> Any:
  """Returns a @ b in float32."""

  def run(acc):
    plgpu.wgmma(acc, a, b)
    return acc[...]

  shape = a.shape[0], b.shape[1]
  return pl.run_scoped(run, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))


def add_product(total, a, b) -> Any:
  """Returns total + a @ b in float32."""
  return pl.run_state(lambda acc: plgpu.wgmma(acc, a, b))(
    plgpu.WGMMAAccumulatorRef.init(total)
  )


def zeros(shape, layout: Any = plgpu.Layout.WGMMA) -> Any:
  """Returns zeros in registers, float32."""
  return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)


def load(ref, layout: Any = plgpu.Layout.WGMMA, optimized=True):
  """Loads into registers, as float32; `optimized` needs shared memory."""
  y = plgpu.load(ref, layout=layout, optimized=optimized)
  return y.astype(jnp.float32)


def load_by_row(ref, shape):
  """Loads a vector [m] and broadcasts it to a matrix [m, n]."""
  return by_row(load(ref, ROW), shape)


def load_by_column(ref, shape):
  """Loads a vector [n] and broadcasts it to a matrix [m, n]."""
  return by_column(load(ref, COLUMN, optimized=False), shape)


def iota(shape, axis, layout: Any = plgpu.Layout.WGMMA):
  """Returns the index of each element along an axis."""
  return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=layout)


def chunks(channels):
  """Returns slices of channels: all of a tile need too many registers."""
  width = 64 if channels % 64 == 0 else 32
  return [slice(start, start + width) for start in range(0, channels, width)]


def statistics(x_tile, epsilon):
  """Returns mean and 1 / sqrt(var + epsilon) of each row [m] of a tile [m, c].

  The variance is computed from differences to the mean.
  """
  rows, channels = x_tile.shape
  mean = var = zeros((rows,), ROW)
  for chunk in chunks(channels):
    mean += load(x_tile.at[:, chunk]).sum(1)
  mean *= 1 / channels
  for chunk in chunks(channels):
    centered = load(x_tile.at[:, chunk])
    centered -= by_row(mean, centered.shape)
    var += (centered * centered).sum(1)
  return mean, jax.lax.rsqrt(var * (1 / channels) + epsilon)


def normalized(x_tile, chunk, mean, inverse):
  """Returns normalized tokens of a slice of channels."""
  y = load(x_tile.at[:, chunk])
  y -= by_row(mean, y.shape)
  return y * by_row(inverse, y.shape)


def normalize(x_tile, target, epsilon):
  """Stores normalized tokens in a tile; returns 1 / deviation of each."""
  mean, inverse = statistics(x_tile, epsilon)
  for chunk in chunks(x_tile.shape[1]):
    y = normalized(x_tile, chunk, mean, inverse)
    target[:, chunk] = y.astype(target.dtype)
  plgpu.commit_smem()
  return inverse


def gelu(x):
  """Returns the exact GELU, within 2e-7 of max(1, |x|), and its derivative.

  With t = 1 / (1 + a |x|), 1 - erf(|x| / sqrt(2)) = poly(t) exp(-x^2 / 2).
  """
  size = jnp.abs(x)
  t = jax.lax.rsqrt(1 + _ERF_SCALE * 0.5**0.5 * size)
  t = t * t
  poly = _ERF[-1] * t
  for coefficient in _ERF[-2::-1]:
    poly = (poly + coefficient) * t
  density = jnp.exp(-0.5 * x * x)
  tail = 0.5 * poly * density
  cdf = jnp.where(x < 0, tail, 1 - tail)
  return x * cdf, cdf + x * density * (2 * math.pi) ** -0.5


def hidden(product, mean, inverse, sums, bias):
  """Returns the input of GELU, from x w1' and broadcast vectors."""
  return (product - mean * sums) * inverse + bias


def kernel(
  body,
  name,
  out_type,
  scratch,
  grid,
  flops,
  transcendentals,
  warpgroups=1,
  semantics=plgpu.LoweringSemantics.Warpgroup,
):
  """Returns a kernel whose programs are in `grid`, {axis: size}.

  With semantics of lanes, layouts in registers are not inferred: all of them
  have to be given, and large bodies are lowered sooner.
  """
  body.__name__ = name
  estimate = {}
  if 'cost_estimate' in inspect.signature(plgpu.kernel).parameters:  # jax 0.12
    estimate['cost_estimate'] = pl.CostEstimate(
      flops=flops, transcendentals=transcendentals, bytes_accessed=0
    )
  return plgpu.kernel(
    body,
    out_type=out_type,
    scratch_types=scratch,
    grid=tuple(grid.values()),
    grid_names=tuple(grid),
    num_threads=warpgroups if warpgroups > 1 else None,
    thread_name='warpgroup' if warpgroups > 1 else None,
    compiler_params=plgpu.CompilerParams(
      approx_math=True, lowering_semantics=semantics
    ),
    **estimate,
  )


def first(warpgroups: int) -> Callable[[Callable[[], None]], None]:
  """Returns a decorator that runs a function in one warpgroup alone."""
  if warpgroups == 1:
    return lambda function: function()
  return pl.when(jax.lax.axis_index('warpgroup') == 0)


def part(size, warpgroups, within=None):
  """Returns the slice of `size` elements that the current warpgroup has.

  `within` is a slice of that part.
  """
  within = within or slice(0, size // warpgroups)
  if warpgroups == 1:
    return within
  start = jax.lax.axis_index('warpgroup') * (size // warpgroups)
  return pl.ds(start + within.start, within.stop - within.start)


def meet(barrier, warpgroups):
  """Waits for the other warpgroups, which then see what this one stored."""
  plgpu.commit_smem()
  if warpgroups > 1:
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def stream(program, specs, arrays, steps, concurrent, met, warpgroups=1):
  """Runs a program that needs blocks of arrays one after the other.

  Args:
    program: called with a function `run`: (step, carry) -> carry, that calls
      step(index, blocks, wait, release, carry) -> carry for each block. `wait`
      and `release` take numbers of arrays, whose blocks are needed next, or no
      longer. All warpgroups meet in `release`.
    specs: blocks of each array.
    arrays: in memory.
    steps: number of blocks.
    concurrent: number of blocks of an array that shared memory holds.
    met: barrier with an arrival of each warpgroup.
    warpgroups: warpgroups of the program.
  """

  def scoped(buffers, barriers):
    def copy(i, index):
      spec, slot = specs[i], jax.lax.rem(index, jnp.int32(concurrent))
      starts = spec.index_map(index)
      block = tuple(
        pl.ds(start * size, size)
        for start, size in zip(starts, spec.block_shape, strict=True)
      )
      plgpu.copy_gmem_to_smem(
        arrays[i].at[block], buffers[i].at[slot], barriers[i].at[slot]
      )

    def run(step, carry):
      def body(index, carry):
        slot = jax.lax.rem(index, jnp.int32(concurrent))
        blocks = [buffer.at[slot] for buffer in buffers]

        def wait(*numbers):
          for i in numbers:
            plgpu.barrier_wait(barriers[i].at[slot])

        def release(*numbers):
          meet(met, warpgroups)

          @pl.when(index + concurrent < steps)
          def _():
            @first(warpgroups)
            def _():
              for i in numbers:
                copy(i, index + concurrent)

        return step(index, blocks, wait, release, carry)

      return jax.lax.fori_loop(jnp.int32(0), jnp.int32(steps), body, carry)

    @first(warpgroups)
    def _():
      for index in range(min(concurrent, steps)):
        for i in range(len(arrays)):
          copy(i, jnp.int32(index))

    program(run)

  pl.run_scoped(
    scoped,
    [
      plgpu.SMEM(
        (concurrent, *spec.block_shape), array.dtype, transforms=spec.transforms
      )
      for spec, array in zip(specs, arrays, strict=True)
    ],
    [plgpu.Barrier(num_barriers=concurrent) for _ in specs],
    collective_axes='warpgroup' if warpgroups > 1 else (),
  )
