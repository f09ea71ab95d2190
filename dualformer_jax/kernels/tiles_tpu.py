"""Tokens in tiles of 8 rows, and what kernels for TPUs share.

A TPU stores rows of channels in tiles of 8. XLA prefers tiles whose 8 rows are
the same token of 8 clips, because grids of tokens are rarely multiples of 8.
Kernels with the same layout need no copies (docs/performance.md).
"""

from collections.abc import Callable
import dataclasses
import math

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from dualformer_jax.kernels import dispatch

ROWS = 8
LANES = 128
# Bytes of vector memory that a kernel may use, of 128 MiB.
VMEM_BYTES = 96 * 2**20
# v5e and v6e. Others have less vector memory, and two cores: a kernel that adds
# up gradients in order would use one of them.
_SUPPORTED = ('TPU v5 lite', 'TPU v5e', 'TPU v6 lite', 'TPU v6e')


def is_supported() -> bool:
  """Returns whether kernels with sums in order suit the target devices."""
  return dispatch.device_kind() in _SUPPORTED


@dataclasses.dataclass(frozen=True)
class Tiling:
  """How a grid of programs divides tokens.

  Attributes:
    size: tiles of 8 rows in the block of one program.
    of_clips: whether the rows of a tile are clips, or tokens of one clip.
  """

  batch: int
  tokens: int
  channels: int
  size: int
  of_clips: bool

  @classmethod
  def choose(
    cls, batch: int, tokens: int, channels: int, max_rows: int
  ) -> 'Tiling | None':
    """Returns the tiling with the largest blocks; None if there is none."""
    of_clips = batch % ROWS == 0
    if not of_clips and tokens % ROWS:
      return None
    tiles = tokens if of_clips else tokens // ROWS
    # Rows of a block are a multiple of 16, for bfloat16.
    sizes = (n for n in range(max_rows // ROWS, 1, -1) if n % 2 == 0)
    size = next((n for n in sizes if tiles % n == 0), 0)
    return cls(batch, tokens, channels, size, of_clips) if size else None

  @property
  def rows(self) -> int:
    """Rows of a block."""
    return self.size * ROWS

  @property
  def grid(self) -> tuple[int, int]:
    """The grid of programs: groups of rows that are clips, blocks of each."""
    if self.of_clips:
      return self.batch // ROWS, self.tokens // self.size
    return self.batch, self.tokens // self.rows

  def split(self, x: Float[Array, 'b n c']) -> Float[Array, 'i j 8 c']:
    """Returns tokens in tiles."""
    if self.of_clips:
      x = x.reshape(-1, ROWS, self.tokens, self.channels)
      return x.transpose(2, 0, 1, 3)
    return x.reshape(self.batch, -1, ROWS, self.channels)

  def join(self, tiles: Float[Array, 'i j 8 c']) -> Float[Array, 'b n c']:
    """Reverts `split`."""
    if self.of_clips:
      tiles = tiles.transpose(1, 2, 0, 3)
    return tiles.reshape(self.batch, self.tokens, self.channels)

  def block(self) -> pl.BlockSpec:
    """Returns the block of tokens of a program, [size, 8, c]."""
    if self.of_clips:
      shape = (self.size, None, ROWS, self.channels)
      return pl.BlockSpec(shape, lambda g, i: (i, g, 0, 0))
    shape = (None, self.size, ROWS, self.channels)
    return pl.BlockSpec(shape, lambda g, i: (g, i, 0, 0))

  def split_scale(self, scale: Float[Array, 'b']) -> Float[Array, 'g 8 1']:
    """Returns a factor of each clip, for the rows of a tile."""
    scale = scale.astype(jnp.float32)
    if self.of_clips:
      return scale.reshape(-1, ROWS, 1)
    return jnp.broadcast_to(scale[:, None, None], (self.batch, ROWS, 1))

  def scale_block(self) -> pl.BlockSpec:
    """Returns the block of `split_scale` of a program, [8, 1]."""
    return pl.BlockSpec((None, ROWS, 1), lambda g, i: (g, 0, 0))


def whole(*shape: int) -> pl.BlockSpec:
  """Returns the block of an array that every program gets as a whole."""
  return pl.BlockSpec(shape, lambda *_: (0,) * len(shape))


def params(axes: int, in_order: bool) -> pltpu.CompilerParams:
  """Returns compiler parameters; programs in order can add to one output."""
  return pltpu.CompilerParams(
    dimension_semantics=('arbitrary' if in_order else 'parallel',) * axes,
    vmem_limit_bytes=VMEM_BYTES,
  )


def rows(tiles: Float[Array, 'i 8 c']) -> Float[Array, 'n c']:
  """Returns the rows of tiles in float32."""
  return tiles.astype(jnp.float32).reshape(-1, tiles.shape[-1])


def tiles(rows: Float[Array, 'n c']) -> Float[Array, 'i 8 c']:
  """Reverts `rows`."""
  return rows.reshape(-1, ROWS, rows.shape[-1])


def dot(
  x: Float[Array, '...'], y: Float[Array, '...'], x_axis: int, y_axis: int
) -> Float[Array, 'n m']:
  """Returns a matrix product, with float32 sums, along axes of x and y."""
  is_float32 = x.dtype == jnp.float32
  return jax.lax.dot_general(
    x,
    y,
    (((x_axis,), (y_axis,)), ((), ())),
    precision=jax.lax.Precision.HIGHEST if is_float32 else None,
    preferred_element_type=jnp.float32,
  )


def for_chunks(
  channels: int, body: Callable[[pl.Slice], None], max_size: int
) -> None:
  """Calls body(slice) for chunks of channels."""
  size = math.gcd(channels, max_size)

  def step(i, carry):
    body(pl.ds(pl.multiple_of(i * size, size), size))
    return carry

  jax.lax.fori_loop(0, channels // size, step, 0)
