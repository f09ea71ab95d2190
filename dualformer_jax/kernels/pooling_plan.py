"""How a kernel for Hopper GPUs pools the tokens of a grid to several levels.

Programs have consecutive tokens, whatever the sizes of the pooling kernels: a
block can have tokens of several programs, and a program tokens of many blocks.
"""

import dataclasses
import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from dualformer_jax.kernels.dispatch import Size

# Rows of an operand of tensor cores: tokens of a tile, blocks of a program.
ROWS = 64
_MAX_TOKENS = 2048  # of a program


@dataclasses.dataclass(frozen=True)
class Level:
  """Blocks of a pooling kernel, in a grid of tokens."""

  rows: int
  columns: int
  size: Size

  @property
  def blocks(self) -> int:
    """Blocks of as many frames as the kernel has."""
    return self.rows // self.size[1] * (self.columns // self.size[2])

  def grid(self, frames: int) -> Size:
    """Returns the number of blocks along each axis of the grid."""
    i, j, k = self.size
    return frames // i, self.rows // j, self.columns // k

  @property
  def weights(self) -> int:
    """Rows of the matrix of weights, a multiple of what a product sums."""
    return math.ceil(math.prod(self.size) / ROWS) * ROWS

  def block(self, token: Any) -> Any:
    """Returns the index of the block of a token, among those of all clips."""
    frame, row, column = self._position(token)
    i, j, k = self.size
    row, column = _quotient(row, j), _quotient(column, k)
    return (
      _quotient(frame, i) * self.blocks + row * (self.columns // k) + column
    )

  def weight(self, token: Any) -> Any:
    """Returns the index of the weights of a token."""
    frame, row, column = self._position(token)
    i, j, k = self.size
    frame, row = _remainder(frame, i), _remainder(row, j)
    return (frame * j + row) * k + _remainder(column, k)

  def first_block(self, start: Any, blocks: int) -> Any:
    """Returns the first of the blocks that a tile of tokens may have.

    Args:
      start: first token of the tile.
      blocks: blocks of all clips.
    """
    frame = self.rows * self.columns
    next_frame = (_quotient(start, frame) + 1) * frame
    row = _quotient(start, self.columns) * self.columns
    minimum = jnp.minimum if isinstance(start, jax.Array) else np.minimum
    first = minimum(self.block(row), self.block(next_frame))
    # Copies start at multiples of 8.
    return _quotient(minimum(first, blocks - ROWS), 8) * 8

  def _position(self, token):
    row = _quotient(token, self.columns)
    frame = _quotient(row, self.rows)
    return frame, row - frame * self.rows, token - row * self.columns


def _quotient(x, divisor):
  if isinstance(x, jax.Array):
    return jax.lax.div(x, jnp.full_like(x, divisor))
  return operator.floordiv(x, divisor)


def _remainder(x, divisor):
  return x - _quotient(x, divisor) * divisor


@dataclasses.dataclass(frozen=True)
class Plan:
  """How programs share the tokens of a grid.

  Attributes:
    levels: blocks of each level.
    tokens: tokens of a program, consecutive.
    tile: tokens of a tile.
    frames: frames of a group, whose blocks are those of no other group.
    counts: blocks of each level that a program can have.
  """

  levels: tuple[Level, ...]
  tokens: int
  tile: int
  frames: int
  counts: tuple[int, ...]


@functools.cache
def find_plan(grid: Size, sizes: tuple[Size, ...]) -> Plan | None:
  """Returns the plan for pooling kernels of these sizes, None without one."""
  divides_all = all(
    n % k == 0 for size in sizes for n, k in zip(grid, size, strict=True)
  )
  if not sizes or not divides_all:
    return None
  _, rows, columns = grid
  levels = tuple(Level(rows, columns, size) for size in sizes)
  frames = math.lcm(*(size[0] for size in sizes))
  group = frames * rows * columns
  if any(level.weights > 2 * ROWS for level in levels):
    return None
  for tokens in range(min(group, _MAX_TOKENS), 0, -1):
    if tokens % columns or group % tokens:
      continue
    tile = next(
      (n for n in range(ROWS, ROWS // 2 - 1, -8) if tokens % n == 0), 0
    )
    counts = _count_blocks(levels, group, tokens)
    if tile and counts and sum(counts) <= ROWS:
      return Plan(levels, tokens, tile, frames, counts)
  return None


def fits(plan: Plan, grid: Size, batch: int, rows: int) -> bool:
  """Returns whether tiles of some rows have few blocks of each level.

  Args:
    plan: blocks of the levels.
    grid: frames, rows and columns of tokens.
    batch: clips.
    rows: tokens of a tile.
  """
  tokens = batch * math.prod(grid)
  group = plan.frames * math.prod(grid[1:])
  token = np.arange(min(tokens, math.lcm(group, rows))).reshape(-1, rows)
  for level in plan.levels:
    blocks = tokens // math.prod(level.size)
    index = level.block(token) - level.first_block(token[:, :1], blocks)
    if blocks < ROWS or blocks % 8 or index.min() < 0 or index.max() >= ROWS:
      return False
  return True


def _count_blocks(levels, group, tokens):
  """Returns the blocks of each level that a program can have.

  Returns None if the first token of a program is not always in the first one.
  """
  counts = []
  for level in levels:
    blocks = level.block(np.arange(group)).reshape(-1, tokens)
    if (blocks < blocks[:, :1]).any():
      return None
    counts.append(int((blocks - blocks[:, :1]).max()) + 1)
  return tuple(counts)


def add_programs(
  plan: Plan, sums: Float[Array, 'p n c']
) -> list[Float[Array, 'm c']]:
  """Returns the sums of all blocks of each level.

  Args:
    plan: of the programs.
    sums: sums of each program for the tokens of a block that it has, of the
      blocks of the first level and then of the others.
  """
  return [_add(plan, level, sums) for level in range(len(plan.levels))]


def _add(plan, index, sums):
  level, size = plan.levels[index], sum(plan.counts)
  group = plan.frames * level.rows * level.columns
  blocks = level.block(np.arange(group))
  starts = np.arange(0, group, plan.tokens)
  # Rows of `sums` that have parts of a block.
  parts = [[] for _ in range(blocks.max() + 1)]
  for program, start in enumerate(starts):
    row = program * size + sum(plan.counts[:index]) - blocks[start]
    for block in np.unique(blocks[start : start + plan.tokens]):
      parts[block].append(row + block)
  channels = sums.shape[-1]
  sums = sums.reshape(-1, len(starts) * size, channels)
  total: Any = 0
  for n in range(max(map(len, parts))):
    rows = np.array([part[min(n, len(part) - 1)] for part in parts])
    is_part = np.array([n < len(part) for part in parts])
    total += jnp.where(is_part[:, None], sums[:, rows], 0)
  return total.reshape(-1, channels)
