"""AdamW and the norm of gradients in few launches, for Hopper GPUs.

A model has hundreds of arrays, most of them small: with a kernel for each, the
launches take longer than the memory traffic. Here the programs of one kernel
share out many arrays, and each has some elements of one of them.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from dualformer_jax.kernels import hopper

# Elements of a program, and the most arrays of a kernel, which has instructions
# for each of them.
_BLOCK = 1024
_MAX_ARRAYS = 64


@dataclasses.dataclass(frozen=True)
class Rates:
  """Constants of AdamW for one array."""

  learning_rate: float  # multiplier of the learning rate
  decay: float
  b1: float
  b2: float
  eps: float


def adamw(arrays: Any, scalars: Any, r: Rates) -> tuple[Any, Any, Any]:
  """Returns the next parameter, mean and square of a gradient.

  `arrays` are a gradient, its parameter and both moments. `scalars` are the
  learning rate, the factor that clips the gradient, and the corrections
  1 / (1 - b^step) of both moments (Loshchilov and Hutter, arXiv 1711.05101,
  algorithm 2).
  """
  gradient, parameter, mean, square = arrays
  learning_rate, clip, mean_correction, square_correction = scalars
  gradient = gradient * clip
  mean = r.b1 * mean + (1 - r.b1) * gradient
  square = r.b2 * square + (1 - r.b2) * (gradient * gradient)
  deviation = jnp.sqrt(square * square_correction)
  update = mean * mean_correction / (deviation + r.eps)
  update += r.decay * parameter
  return parameter - r.learning_rate * learning_rate * update, mean, square


def update(
  arrays: Sequence[tuple[jax.Array, jax.Array, jax.Array, jax.Array]],
  scalars: Float[Array, '4'],
  rates: Sequence[Rates],
) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
  """Returns `adamw` of each (gradient, parameter, mean, square), float32."""
  groups, rest = _split([gradient for gradient, *_ in arrays])
  new = {i: adamw(arrays[i], scalars, rates[i]) for i in rest}
  for group in groups:
    values = _update(
      [arrays[i] for i in group], scalars, [rates[i] for i in group]
    )
    new |= zip(group, values, strict=True)
  return [new[i] for i in range(len(arrays))]


def _split(arrays: Sequence[jax.Array]) -> tuple[list[list[int]], list[int]]:
  """Returns indices of the arrays of each kernel, and of those without one.

  Kernels store whole lines of the cache: 32 numbers.
  """
  fit = [i for i, array in enumerate(arrays) if array.size % 32 == 0]
  starts = range(0, len(fit), _MAX_ARRAYS)
  rest = sorted({*range(len(arrays))} - {*fit})
  return [fit[start : start + _MAX_ARRAYS] for start in starts], rest


def _update(arrays, scalars, rates):
  gradients = [gradient for gradient, *_ in arrays]

  def body(scalars, *refs):
    values = [scalars[i] for i in range(4)]

    def visit(index, pieces):
      mine = refs[4 * index : 4 * index + 4]
      for elements, layout in pieces:
        old = [
          hopper.load(ref.at[elements], layout, optimized=False) for ref in mine
        ]
        new = adamw(old, values, rates[index])
        for ref, value in zip(mine[1:], new, strict=True):
          ref[elements] = value

    _share_out([gradient.size for gradient in gradients], visit)

  # XLA updates an array in place if nothing else needs its old values.
  refs = []
  for gradient, *state in arrays:
    refs += [gradient.ravel(), *(jax.new_ref(array.ravel()) for array in state)]
  _kernel(body, 'adamw', gradients, ())(scalars, *refs)
  return [
    tuple(ref[...].reshape(g.shape) for ref in refs[4 * i + 1 : 4 * i + 4])
    for i, g in enumerate(gradients)
  ]


def norm(arrays: Sequence[jax.Array]) -> Float[Array, '']:
  """Returns the Euclidean norm of all elements of float32 arrays."""
  groups, rest = _split(arrays)
  squares = [_squares([arrays[i] for i in group]).sum() for group in groups]
  squares += [jnp.sum(arrays[i] * arrays[i]) for i in rest]
  return jnp.sqrt(jnp.stack(squares).sum())


def _squares(arrays):
  """Returns the sum of squares of each program."""

  def body(*refs):
    *refs, out = refs

    def visit(index, pieces):
      total = 0.0
      for elements, layout in pieces:
        ref = refs[index].at[elements]
        value = hopper.load(ref, layout, optimized=False)
        total += (value * value).sum()
      out[jax.lax.axis_index('block')] = total

    _share_out([array.size for array in arrays], visit)

  out = jax.ShapeDtypeStruct((_programs(arrays),), jnp.float32)
  run = _kernel(body, 'squared_norm', arrays, out)
  return run(*(array.ravel() for array in arrays))


def _programs(arrays: Sequence[jax.Array]) -> int:
  return sum(-(-array.size // _BLOCK) for array in arrays)


def _kernel(body, name, arrays, out_type):
  return hopper.kernel(
    body,
    name,
    out_type=out_type,
    scratch=(),
    grid={'block': _programs(arrays)},
    flops=0,
    transcendentals=0,
    semantics=plgpu.LoweringSemantics.Lane,
  )


def _share_out(
  sizes: Sequence[int], visit: Callable[[int, list[tuple[Any, Any]]], None]
) -> None:
  """Calls visit(index, pieces) for the elements of the current program.

  They are of the array `index`; pieces are (elements, layout in registers).
  """
  program = jax.lax.axis_index('block')
  start = 0
  for index, size in enumerate(sizes):
    blocks, rest = divmod(size, _BLOCK)
    end = start + blocks
    if blocks:

      @pl.when((start <= program) & (program < end))
      def _(index=index, start=start):
        elements = pl.ds((program - start) * _BLOCK, _BLOCK)
        visit(index, [(elements, _strided(_BLOCK, 4))])

    if rest:

      @pl.when(program == end)
      def _(index=index, size=size, rest=rest):
        # Less than 128 elements are loaded by several threads each.
        first, last = size - rest, size - rest % 128
        pieces = []
        if first < last:
          pieces.append((slice(first, last), _strided(last - first, 1)))
        if last < size:
          pieces.append((slice(last, size), hopper.COLUMN))
        visit(index, pieces)

    start = end + bool(rest)


def _strided(size: int, vector: int) -> Any:
  return plgpu.Layout.WG_STRIDED((size,), vec_size=vector)
