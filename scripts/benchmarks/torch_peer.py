"""DualFormer in PyTorch, for comparison in benchmarks; not part of the package.

It runs the operations of the published implementation: general convolutions,
channels moved to the front and back around each of them, and attention that
saves its score matrix. Parameter names are those of the published .pth files.
tests/scripts/test_torch_peer.py compares it with the published figures.

With `attention='sdpa'` it uses PyTorch's fused attention instead, which is
faster.
"""
# pyright: reportMissingImports=false
# (torch is in the extra `benchmark`, which nothing else needs)

from collections.abc import Mapping, Sequence
import itertools
import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional

Size = tuple[int, int, int]


def attend(
  q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attention: str
) -> torch.Tensor:
  """Computes attention of arrays [..., heads, tokens, channels per head]."""
  if attention == 'sdpa':
    return functional.scaled_dot_product_attention(q, k, v)
  scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
  return scores.softmax(-1) @ v


class LocalWindowAttention(nn.Module):
  """Attention within windows, which must tile the grid."""

  def __init__(self, channels: int, heads: int, window: Size, attention: str):
    super().__init__()
    self.heads, self.window, self.attention = heads, window, attention
    self.qkv = nn.Linear(channels, 3 * channels)
    self.proj = nn.Linear(channels, channels)

  def forward(self, x: torch.Tensor, grid: Size) -> torch.Tensor:
    batch, tokens, channels = x.shape
    (d, h, w), (i, j, k) = grid, self.window
    x = x.view(batch, d // i, i, h // j, j, w // k, k, channels)
    x = x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(
      batch, -1, i * j * k, channels
    )
    qkv = self.qkv(x).view(*x.shape[:3], 3, self.heads, -1)
    q, k_, v = qkv.permute(3, 0, 1, 4, 2, 5)
    x = attend(q, k_, v, self.attention).transpose(2, 3)
    x = x.reshape(batch, d // i, h // j, w // k, i, j, k, channels)
    x = x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(batch, tokens, channels)
    return self.proj(x)


class GlobalPyramidAttention(nn.Module):
  """Attention of all tokens to tokens pooled by strided convolutions."""

  def __init__(
    self,
    channels: int,
    heads: int,
    grid: Size,
    fine_size: Size,
    coarse_size: Size | None,
    attention: str,
  ):
    super().__init__()
    self.heads, self.attention = heads, attention
    self.q = nn.Linear(channels, channels)
    self.kv = nn.Linear(channels, 2 * channels)
    self.proj = nn.Linear(channels, channels)

    def pool(kernel: Size) -> nn.Conv3d:
      return nn.Conv3d(channels, channels, kernel, kernel, groups=channels)

    def ratio(sizes: Size, by: Size) -> Size:
      d, h, w = (max(1, n // m) for n, m in zip(sizes, by, strict=True))
      return d, h, w

    kernel = ratio(grid, fine_size)
    self.pooled = math.prod(kernel) > 1
    self.coarse = self.pooled and coarse_size is not None
    if self.pooled:
      self.sr = pool(kernel)
      self.norm = nn.LayerNorm(channels)
    if self.coarse and coarse_size is not None:
      self.lr = nn.Sequential(
        pool((1, 7, 7)),
        nn.BatchNorm3d(channels),
        nn.ReLU(),
        pool(ratio(ratio(grid, coarse_size), (1, 7, 7))),
      )

  def forward(self, x: torch.Tensor, grid: Size) -> torch.Tensor:
    batch, tokens, channels = x.shape
    q = self.q(x).view(batch, tokens, self.heads, -1).transpose(1, 2)
    if self.pooled:
      volume = x.transpose(1, 2).reshape(batch, channels, *grid)
      levels = [self.sr(volume).flatten(2)]
      if self.coarse:
        levels.append(self.lr(volume).flatten(2))
      x = self.norm(torch.cat(levels, 2).transpose(1, 2))
    kv = self.kv(x).view(batch, -1, 2, self.heads, channels // self.heads)
    k, v = kv.permute(2, 0, 3, 1, 4)
    x = attend(q, k, v, self.attention)
    return self.proj(x.transpose(1, 2).reshape(batch, tokens, channels))


class Mlp(nn.Module):
  def __init__(self, channels: int):
    super().__init__()
    self.fc1 = nn.Linear(channels, 4 * channels)
    self.fc2 = nn.Linear(4 * channels, channels)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return self.fc2(functional.gelu(self.fc1(x)))


class Block(nn.Module):
  """Attention and MLP, each with a residual connection and drop path."""

  def __init__(self, attn: nn.Module, channels: int, drop_path: float):
    super().__init__()
    self.norm1 = nn.LayerNorm(channels)
    self.attn = attn
    self.norm2 = nn.LayerNorm(channels)
    self.mlp = Mlp(channels)
    self.drop_path = drop_path

  def drop(self, x: torch.Tensor) -> torch.Tensor:
    if not self.training or not self.drop_path:
      return x
    keep = 1 - self.drop_path
    return x * x.new_empty(len(x), 1, 1).bernoulli_(keep).div_(keep)

  def forward(self, x: torch.Tensor, grid: Size) -> torch.Tensor:
    x = x + self.drop(self.attn(self.norm1(x), grid))
    return x + self.drop(self.mlp(self.norm2(x)))


class PatchEmbedding(nn.Module):
  def __init__(self, inputs: int, channels: int, patch: Size):
    super().__init__()
    self.proj = nn.Conv3d(inputs, channels, patch, patch)
    self.norm = nn.LayerNorm(channels)

  def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Size]:
    x = self.proj(x)
    grid = (x.shape[2], x.shape[3], x.shape[4])
    return self.norm(x.flatten(2).transpose(1, 2)), grid


class PositionalConvolution(nn.Module):
  def __init__(self, channels: int):
    super().__init__()
    self.proj = nn.Sequential(
      nn.Conv3d(channels, channels, 3, padding=1, groups=channels)
    )

  def forward(self, x: torch.Tensor, grid: Size) -> torch.Tensor:
    volume = x.transpose(1, 2).view(len(x), -1, *grid)
    return (self.proj(volume) + volume).flatten(2).transpose(1, 2)


class Backbone(nn.Module):
  def __init__(
    self,
    depths: Sequence[int],
    embed_dims: Sequence[int],
    num_heads: Sequence[int],
    grid: Size,
    window: Size,
    fine_sizes: Sequence[Size],
    coarse_sizes: Sequence[Size | None],
    drop_path_rate: float,
    attention: str,
  ):
    super().__init__()
    rates = iter(np.linspace(0, drop_path_rate, sum(depths)).tolist())
    self.patch_embeds, self.pos_block = nn.ModuleList(), nn.ModuleList()
    self.blocks = nn.ModuleList()
    inputs = 3
    for stage, (depth, channels, heads) in enumerate(
      zip(depths, embed_dims, num_heads, strict=True)
    ):
      patch = (2, 4, 4) if stage == 0 else (1, 2, 2)
      d, h, w = (n // p for n, p in zip(grid, patch, strict=True))
      grid = (d, h, w)
      self.patch_embeds.append(PatchEmbedding(inputs, channels, patch))
      blocks = nn.ModuleList()
      for index in range(depth):
        if index % 2 == 0:
          attn = LocalWindowAttention(channels, heads, window, attention)
        else:
          sizes = fine_sizes[stage], coarse_sizes[stage]
          attn = GlobalPyramidAttention(
            channels, heads, grid, *sizes, attention
          )
        blocks.append(Block(attn, channels, next(rates)))
      self.blocks.append(blocks)
      self.pos_block.append(PositionalConvolution(channels))
      inputs = channels
    self.norm = nn.LayerNorm(inputs)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    grid = (0, 0, 0)
    for stage, embed in enumerate(self.patch_embeds):
      if stage:
        x = x.transpose(1, 2).reshape(len(x), -1, *grid)
      x, grid = embed(x)
      for index, block in enumerate(self.blocks[stage]):
        x = block(x, grid)
        if index == 0:
          x = self.pos_block[stage](x, grid)
    return self.norm(x)


class Head(nn.Module):
  def __init__(self, channels: int, num_classes: int, dropout: float):
    super().__init__()
    self.dropout = nn.Dropout(dropout)
    self.fc_cls = nn.Linear(channels, num_classes)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return self.fc_cls(self.dropout(x.mean(1)))


class DualFormer(nn.Module):
  """Classifier of clips [b, 3, t, y, x].

  Takes the fields of `config.model` except those for JAX, and `attention`:
  'materialized', as published, or 'sdpa'.
  """

  def __init__(
    self,
    depths: Sequence[int],
    embed_dims: Sequence[int],
    num_heads: Sequence[int],
    num_classes: int,
    num_frames: int = 32,
    image_size: int = 224,
    window: Size = (8, 7, 7),
    fine_sizes: Sequence[Size] = ((8, 7, 7), (8, 7, 7), (8, 7, 7), (16, 7, 7)),
    coarse_sizes: Sequence[Size | None] = ((4, 4, 4), (4, 4, 4), None, None),
    drop_path_rate: float = 0.0,
    head_dropout: float = 0.5,
    attention: str = 'materialized',
  ):
    super().__init__()
    self.backbone = Backbone(
      depths,
      embed_dims,
      num_heads,
      (num_frames, image_size, image_size),
      window,
      fine_sizes,
      coarse_sizes,
      drop_path_rate,
      attention,
    )
    self.cls_head = Head(embed_dims[-1], num_classes, head_dropout)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return self.cls_head(self.backbone(x))


def make_optimizer(
  model: nn.Module, learning_rate: float, weight_decay: float
) -> torch.optim.AdamW:
  """Returns AdamW with the rates and decays of the published recipe."""

  def multipliers(name: str) -> tuple[float, float]:
    if 'pos_block' in name:
      return 1, 0
    return (0.1, 1) if name.startswith('backbone.') else (1, 1)

  groups = [
    {
      'params': [p for _, p in named],
      'lr': rate * learning_rate,
      'weight_decay': decay * weight_decay,
    }
    for (rate, decay), named in itertools.groupby(
      sorted(model.named_parameters(), key=lambda item: multipliers(item[0])),
      key=lambda item: multipliers(item[0]),
    )
  ]
  return torch.optim.AdamW(groups)


def load(model: nn.Module, state_dict: Mapping[str, np.ndarray]) -> None:
  """Loads arrays by their names in a published .pth; all are required."""
  model.load_state_dict(
    {name: torch.from_numpy(array) for name, array in state_dict.items()}
  )
