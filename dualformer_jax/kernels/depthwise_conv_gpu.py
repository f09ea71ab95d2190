"""The positional convolution as Pallas kernels for Hopper GPUs.

A program has a tile of rows, columns and channels and marches over frames. It
copies each frame of its tile, with a border of one token, into a ring of four
frames in shared memory: the three that the next output needs, and the one
after them. Borders outside of the grid stay zero, because no copy writes to
them. The backward pass is the same convolution of the output gradient with the
flipped kernel; in the same pass, it sums the gradients of the weights in
registers.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from dualformer_jax.kernels import hopper

# The most rows and columns of a tile, and the fewest tokens.
_SIDE = 8
_MIN_TOKENS = 16
# Programs that run at a time, two on each multiprocessor of an H100 or H200.
_PROGRAMS = 264
_FRAMES = 4  # of the ring
_CENTER = 13  # of the 27 weights


@dataclasses.dataclass(frozen=True)
class _Tile:
  """Sizes of the outputs of a program."""

  frames: int
  rows: int
  columns: int
  channels: int

  @property
  def margin(self) -> int:
    """Columns of a border in shared memory: 128 bytes, which copies need."""
    return 64 // self.channels

  @property
  def step(self) -> int:
    """Columns of an array in registers, whose threads have 2 channels each."""
    return 256 // self.channels

  @property
  def layout(self) -> Any:
    """The layout of arrays [rows, step, channels] in registers."""
    shape = 1, self.step, self.channels
    if self.channels == 64:  # a warp has one column
      tiles, warps, lanes = (shape, (2,)), (-3,), (-2,)
    else:  # a warp has two columns
      tiles, warps, lanes = (shape, (2, 32), (2,)), (-5,), (-3, -2)
    tiling = plgpu.Tiling(tiles)
    return plgpu.Layout.TILED(tiling, warps, lanes, vector_dim=-1)


def fits(frames: int, rows: int, columns: int, channels: int) -> bool:
  """Returns whether `positional_conv` supports a grid of tokens."""
  if channels % 32:
    return False
  tile = _choose_tile(1, frames, rows, columns, channels)
  return tile.columns >= tile.step and tile.rows * tile.columns >= _MIN_TOKENS


def _choose_tile(
  batch: int, frames: int, rows: int, columns: int, channels: int
) -> _Tile:
  tile_channels = 64 if channels % 64 == 0 else 32
  tile_rows = hopper.largest_divisor(rows, _SIDE)
  tile_columns = hopper.largest_divisor(columns, _SIDE)
  tiles = batch * channels * rows * columns
  tiles //= tile_channels * tile_rows * tile_columns
  # Each program also reads the two frames around its own.
  splits = hopper.largest_divisor(frames, _PROGRAMS // tiles)
  return _Tile(frames // splits, tile_rows, tile_columns, tile_channels)


@jax.custom_vjp
def positional_conv(
  x: Float[Array, 'b d h w c'],
  kernel: Float[Array, '3 3 3 c'],
  bias: Float[Array, 'c'],
) -> Float[Array, 'b d h w c']:
  """Returns x + conv(x) + bias of bfloat16 tokens, with zero padding of 1."""
  return _convolve(x, kernel, bias)[0]


def _positional_conv_fwd(x, kernel, bias):
  return positional_conv(x, kernel, bias), (x, kernel)


def _positional_conv_bwd(residuals, dy):
  x, kernel = residuals
  no_bias = jnp.zeros(x.shape[-1], jnp.float32)
  dx, sums = _convolve(dy, kernel[::-1, ::-1, ::-1], no_bias, x)
  sums = sums.sum(0)
  return dx, sums[26::-1].reshape(kernel.shape), sums[27]


positional_conv.defvjp(_positional_conv_fwd, _positional_conv_bwd)


# Compiled functions are traced and lowered once for all calls of a shape.
@jax.jit
def _convolve(y, kernel, bias, *xs):
  """Returns y + conv(y) + bias and, given x, sums over tokens.

  Those are of each program, [n, 28, c]: of x times each of the 27 shifted y,
  and of y.
  """
  batch, frames, rows, columns, channels = y.shape
  tile = _choose_tile(*y.shape)
  margin, num_xs = tile.margin, len(xs)
  width = min(tile.columns + 2 * margin, columns)
  shape = tile.rows, tile.step, tile.channels
  pitch = math.ceil(tile.columns / tile.step) * tile.step
  # Copies of a tile without borders; TMA writes no gaps.
  copies = 1 if pitch == tile.columns else tile.rows
  grid = {
    'column': columns // tile.columns,
    'row': rows // tile.rows,
    'channel': channels // tile.channels,
    'frame': frames // tile.frames,
    'clip': batch,
  }

  def load(ref):
    return hopper.load(ref, tile.layout)

  def load_vector(ref):
    vector = hopper.load(ref, tile.layout.reduce((0, 1)))
    return jax.lax.broadcast_in_dim(vector, shape, (2,))

  def body(*refs):
    y, kernel, bias, *refs = refs
    xs, refs = refs[:num_xs], refs[num_xs:]
    out, *sums, ring, x_tiles, out_tile, arrived, x_arrived = refs
    program = {name: jax.lax.axis_index(name) for name in grid}
    clip, start = program['clip'], program['frame'] * tile.frames
    top, left = program['row'] * tile.rows, program['column'] * tile.columns
    mine = pl.ds(program['channel'] * tile.channels, tile.channels)
    # The columns to copy, and where they begin in shared memory.
    source = jnp.clip(left - margin, 0, columns - width)
    target = source - left + 2 * margin

    def first_row(frame):
      """Returns the first row of a frame of the program, of all rows."""
      return (clip * frames + start + frame) * rows

    def blocks(ref, frame, tile_ref):
      """Pairs the tile of a frame with shared memory, in blocks to copy."""
      row = first_row(frame) + top
      width = pl.ds(0, tile.columns)
      part = pl.ds(left, tile.columns)
      if copies == 1:
        return [(ref.at[pl.ds(row, tile.rows), part, mine], tile_ref)]
      return [
        (ref.at[row + i, part, mine], tile_ref.at[i, width])
        for i in range(tile.rows)
      ]

    def is_inside(step):
      frame = start + step - 1
      return (frame >= 0) & (frame < frames)

    def copy_frame(step):
      """Copies a frame of y; `step` 0 is the one before the first output."""
      slot = jax.lax.rem(step, _FRAMES)

      @pl.when(is_inside(step))
      def _():
        for i in range(tile.rows + 2):
          row = top + i - 1
          # Rows outside of the grid are copied to where nothing is read.
          to = jnp.where((row >= 0) & (row < rows), i, tile.rows + 2)
          row = first_row(step - 1) + jnp.clip(row, 0, rows - 1)
          plgpu.copy_gmem_to_smem(
            y.at[row, pl.ds(source, width), mine],
            ring.at[slot, to, pl.ds(target, width)],
            arrived.at[slot],
          )

      @pl.when(jnp.logical_not(is_inside(step)))
      def _():
        clear(slot)

    def clear(slot):
      zeros = hopper.zeros(ring.shape[1:], tile.layout)
      ring[slot] = zeros.astype(ring.dtype)

    def copy_x(frame):
      slot = jax.lax.rem(frame, 2)
      for x in xs:
        for source, target in blocks(x, frame, x_tiles.at[slot]):
          plgpu.copy_gmem_to_smem(source, target, x_arrived.at[slot])

    def wait_for_frame(step):
      @pl.when(is_inside(step))
      def _():
        plgpu.barrier_wait(arrived.at[jax.lax.rem(step, _FRAMES)])

    def compute(frame, part, totals):
      """Computes `step` columns of a frame, and adds to the sums."""
      totals = list(totals)
      # The last part overlaps the one before it, unless `step` divides.
      first = jnp.minimum(part * tile.step, tile.columns - tile.step)
      index = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=tile.layout)
      is_new = (first + index >= part * tile.step).astype(jnp.float32)
      factors = []
      if xs:
        slot = jax.lax.rem(frame, 2)
        factors = [load(x_tiles.at[slot, :, pl.ds(first, tile.step)]) * is_new]
      result = bias_tile
      for i, k in itertools.product(range(3), range(3)):
        slot = jax.lax.rem(frame + i, _FRAMES)
        shifted = pl.ds(first + 2 * margin - 1 + k, tile.step)
        bordered = load(ring.at[slot, pl.ds(0, tile.rows + 2), shifted])
        for j in range(3):
          n = 9 * i + 3 * j + k
          y = bordered[j : j + tile.rows]
          result += y * weights[n]
          for factor in factors:
            totals[n] += (y * factor).sum(0)
          if n == _CENTER:
            result += y
          if n == _CENTER and xs:
            totals[27] += (y * is_new).sum(0)
      out_tile[:, pl.ds(first, tile.step)] = result.astype(out_tile.dtype)
      return tuple(totals)

    def run(frame, totals):
      @pl.when(frame + 1 < tile.frames)
      def _():
        copy_frame(frame + 3)
        copy_x(frame + 1)

      wait_for_frame(frame + 2)
      if xs:
        plgpu.barrier_wait(x_arrived.at[jax.lax.rem(frame, 2)])
      plgpu.wait_smem_to_gmem(0)
      part = functools.partial(compute, frame)
      totals = jax.lax.fori_loop(0, pitch // tile.step, part, totals)
      plgpu.commit_smem()
      for target, source in blocks(out, frame, out_tile):
        plgpu.copy_smem_to_gmem(source, target)
      return totals

    for slot in range(_FRAMES):
      clear(slot)
    plgpu.commit_smem()
    for step in range(3):
      copy_frame(step)
    copy_x(0)
    weights = [load_vector(kernel.at[n, mine]) for n in range(27)]
    bias_tile = load_vector(bias.at[mine])
    for step in range(2):
      wait_for_frame(step)
    zeros = hopper.zeros(shape[1:], tile.layout.reduce(0))
    totals = (zeros,) * (28 * len(sums))
    totals = jax.lax.fori_loop(0, tile.frames, run, totals)
    plgpu.wait_smem_to_gmem(0)
    index = 0
    for name in ('clip', 'frame', 'row', 'column'):
      index = index * grid[name] + program[name]
    for n, total in enumerate(totals):
      sums[0][index, n, mine] = total.sum(0)

  programs = math.prod(grid.values()) // grid['channel']
  flat = batch * frames * rows, columns, channels
  outputs = [
    jax.ShapeDtypeStruct(flat, y.dtype),
    *[jax.ShapeDtypeStruct((programs, 28, channels), jnp.float32) for _ in xs],
  ]
  smem = functools.partial(plgpu.SMEM, dtype=y.dtype)
  scratch = (
    smem((_FRAMES, tile.rows + 3, pitch + 4 * margin, tile.channels)),
    smem((2 * len(xs) or 1, tile.rows, pitch, tile.channels)),
    smem((tile.rows, pitch, tile.channels)),
    plgpu.Barrier(num_arrivals=tile.rows + 2, num_barriers=_FRAMES),
    plgpu.Barrier(num_arrivals=copies, num_barriers=2),
  )
  kernel = kernel.reshape(27, channels).astype(y.dtype).astype(jnp.float32)
  out, *sums = hopper.kernel(
    body,
    'positional_conv_gradient' if xs else 'positional_conv',
    out_type=outputs,
    scratch=scratch,
    grid=grid,
    flops=0,
    transcendentals=0,
  )(y.reshape(flat), kernel, bias, *[x.reshape(flat) for x in xs])
  return out.reshape(y.shape), *sums
