"""Tiles of tokens of the grid or of windows, in kernels for Hopper GPUs."""

import math

import einops
import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from dualformer_jax.kernels.dispatch import Size

# Frames of a window.
FRAMES = 8
# Tokens of a program, by channels: what fits into registers, shared memory.
ROWS = {64: 128, 96: 128, 128: 128, 192: 64, 256: 64, 384: 64, 512: 64}

Window = tuple[int, int] | None


def fits(batch: int, grid: Size, channels: int, window: Size | None) -> bool:
  """Returns whether the kernels support these sizes.

  Args:
    batch: clips of a device; 0 if devices share clips.
    grid: frames, rows and columns of tokens.
    channels: channels of the tokens and of each output.
    window: frames, rows and columns of a window, or None.
  """
  if window and (
    window[0] != FRAMES or any(g % w for g, w in zip(grid, window, strict=True))
  ):
    return False
  tokens = batch * math.prod(grid)
  return tokens > 0 and channels in ROWS and tokens % ROWS[channels] == 0


def copied_grid(x, window):
  """Returns x as it is copied, and a function that pairs blocks to copy.

  The function pairs blocks of a reference to the former with those of a tile in
  shared memory that has the tokens of a program.
  """
  channels = x.shape[-1]
  rows = ROWS[channels]
  if window is None:

    def whole(ref, tile):
      return [(ref.at[tokens_of_program(rows)], tile)]

    return x.reshape(-1, channels), whole

  find = positions(x.shape, window)

  def by_position(ref, tile):
    first = jax.lax.axis_index('rows') * (rows // FRAMES)
    for i in range(rows // FRAMES):
      group, position = find(first + i)
      yield ref.at[group, :, position], tile.at[pl.ds(FRAMES * i, FRAMES)]

  return by_frames(x), by_position


def by_frames(x):
  """Returns x [n, frames of a window, rows x columns, c]."""
  _, _, height, width, channels = x.shape
  return x.reshape(-1, FRAMES, height * width, channels)


def positions(shape, window):
  """Returns a function that locates the nth 8 tokens of windows.

  It returns their indices in the first and third axes of `by_frames`.
  """
  _, _, height, width, _ = shape

  def split(n, size):
    # Numbers are not negative, so that nothing needs to be rounded down.
    return jax.lax.div(n, jnp.int32(size)), jax.lax.rem(n, jnp.int32(size))

  def find(n):
    n, column = split(n, window[1])
    n, row = split(n, window[0])
    n, k = split(n, width // window[1])
    n, j = split(n, height // window[0])
    return n, (j * window[0] + row) * width + k * window[1] + column

  return find


def to_grid(y, window, shape):
  """Returns tokens [n, c] of windows in the order of a grid of some shape."""
  if window is None:
    return y.reshape(shape)
  _, frames, height, width, _ = shape
  return einops.rearrange(
    y,
    '(b i j k wh ww wd) c -> b (i wd) (j wh) (k ww) c',
    wd=FRAMES,
    wh=window[0],
    ww=window[1],
    i=frames // FRAMES,
    j=height // window[0],
    k=width // window[1],
  )


def step_width(channels):
  """Returns the channels of a step of a program."""
  return math.gcd(channels, 64)


def tokens_of_program(rows):
  """Returns the tokens of a program."""
  return pl.ds(jax.lax.axis_index('rows') * rows, rows)


def num_copies(rows, window):
  """Returns the number of blocks to copy for each program."""
  return 1 if window is None else rows // FRAMES


def write(y, tile, out):
  """Writes registers to memory by a tile of shared memory."""
  plgpu.wait_smem_to_gmem(0)
  tile[...] = y.astype(tile.dtype)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(tile, out)
