"""Tiles of the tokens of windows, in kernels for the attention branch."""

from collections.abc import Callable, Iterator
import dataclasses
import math
from typing import Any

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from dualformer_jax.kernels import hopper, windows_gpu
from dualformer_jax.kernels.dispatch import Size

HEAD = 32  # channels
ROWS = 64  # of a tile: the tokens that a warpgroup has at a time
POSITIONS = ROWS // windows_gpu.FRAMES  # of a tile


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Sizes of windows, and how warpgroups share their tokens.

  Tokens of a window are in tiles, of which the last one may have padding.

  Attributes:
    grid: frames, rows and columns of tokens.
    window: frames, rows and columns of a window.
    channels: channels of all heads.
    clips: clips of all windows.
  """

  grid: Size
  window: Size
  channels: int
  clips: int

  @property
  def tokens(self) -> int:
    """Tokens of a window."""
    return math.prod(self.window)

  @property
  def windows_of_clip(self) -> int:
    """Windows of a clip."""
    return math.prod(self.grid) // self.tokens

  @property
  def windows(self) -> int:
    """Windows of all clips."""
    return self.clips * self.windows_of_clip

  @property
  def heads(self) -> int:
    """Attention heads."""
    return self.channels // HEAD

  @property
  def tiles(self) -> int:
    """Tiles of a window."""
    return -(-self.tokens // ROWS)

  @property
  def rows(self) -> int:
    """Rows of the tiles of a window, with padding."""
    return self.tiles * ROWS

  @property
  def warpgroups(self) -> int:
    """Warpgroups of a program, which take turns with the tiles."""
    return 2 if self.tiles >= 4 else 1

  def warpgroup(self) -> Any:
    """Returns the index of the current warpgroup."""
    if self.warpgroups == 1:
      return jnp.int32(0)
    return jax.lax.axis_index('warpgroup')

  def shared(self, channels):
    """Returns tiles in shared memory, one for each warpgroup; see `own`."""
    buffers = () if self.warpgroups == 1 else (self.warpgroups,)
    return hopper.tile(ROWS, channels, HEAD, buffers)

  def own(self, tiles):
    """Returns the tile of the current warpgroup."""
    return tiles if self.warpgroups == 1 else tiles.at[self.warpgroup()]

  def for_tiles(self, function, *carry):
    """Calls function(tile, *carry) for the tiles of the current warpgroup.

    The first one has the index of the warpgroup, and `following` returns the
    next one. The function returns the next carry, or None without one.
    """
    first = self.warpgroup()
    groups = jnp.int32(self.warpgroups)

    def body(step, carry):
      return function(first + groups * step, *carry) or ()

    steps = jax.lax.div(self.tiles - first + groups - 1, groups)
    return jax.lax.fori_loop(jnp.int32(0), steps, body, carry)

  def following(self, tile):
    """Returns the next tile of a warpgroup, and whether there is one."""
    tile += self.warpgroups
    return tile, tile < self.tiles

  def blocks(self, most: int) -> Iterator[Any]:
    """Yields blocks of at most `most` keys or queries, with padding."""
    # The swizzled columns of operands divide the number of summed products.
    end = -(-self.tokens // HEAD) * HEAD
    for start in range(0, end, most):
      yield pl.ds(start, min(most, end - start))

  def copies(self, window, tile, ref, target, columns=None, count=POSITIONS):
    """Pairs blocks of the grid with those of a tile; padding repeats tokens.

    Args:
      window: index of the window.
      tile: index of the tile.
      ref: the grid, as `windows_gpu.by_frames` returns it.
      target: a tile in shared memory.
      columns: channels of the grid to copy, or None for all.
      count: number of blocks, of 8 tokens each.
    """
    find = windows_gpu.positions((None, *self.grid, None), self.window[1:])
    positions = self.tokens // windows_gpu.FRAMES
    columns = pl.ds(0, self.channels) if columns is None else columns
    for i in range(count):
      index = jnp.minimum(tile * POSITIONS + i, positions - 1)
      group, position = find(window * positions + index)
      rows = pl.ds(windows_gpu.FRAMES * i, windows_gpu.FRAMES)
      yield ref.at[group, :, position, columns], target.at[rows]

  def tokens_of(self, tile) -> Callable[[Callable[[int], None]], None]:
    """Returns a decorator that calls a function with the tokens of a tile.

    Their number is a Python integer, as sizes of copies are.
    """
    rest = self.tokens % ROWS

    def run(function):
      if not rest:
        function(ROWS)
        return
      is_last = tile == self.tiles - 1
      pl.when(jnp.logical_not(is_last))(lambda: function(ROWS))
      pl.when(is_last)(lambda: function(rest))

    return run


def project(x_tile, kernel, means, inverses, sums, bias):
  """Returns queries, keys or values [64, 32] of a tile of tokens.

  Args:
    x_tile: tokens.
    kernel: weights, with the scale of the norm.
    means: mean of each token.
    inverses: 1 / deviation of each token.
    sums: sums of the columns of the weights.
    bias: bias, with that of the norm.
  """
  product = hopper.product(x_tile, kernel)
  return hopper.hidden(
    product,
    hopper.load_by_row(means, product.shape),
    hopper.load_by_row(inverses, product.shape),
    hopper.load_by_column(sums, product.shape),
    hopper.load_by_column(bias, product.shape),
  )
