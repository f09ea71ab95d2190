"""Where a model looks: Grad-CAM, and the weights of global attention."""

import math
import re
from typing import Any

from einops import rearrange
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dualformer_jax.errors import UserError
from dualformer_jax.models.attention import pyramid_kernels
from dualformer_jax.models.dualformer import DualFormer
from dualformer_jax.models.layers import Size


def find_block(model: DualFormer, layer: str) -> tuple[int, int]:
  """Returns stage and place of the block that is named `layer`.

  Args:
    model: the model.
    layer: 'blocks.3.1', 'blocks_3_1' or 'backbone/blocks/3/1', say.

  Raises:
    UserError: the model has no such block.
  """
  known = {
    f'blocks.{stage}.{index}': (stage, index)
    for stage, depth in enumerate(model.depths)
    for index in range(depth)
  }
  name = re.sub('[/_]', '.', layer).removeprefix('backbone.')
  if name not in known:
    raise UserError(
      f'layer {layer!r} is unknown; expected one of {", ".join(known)}'
    )
  return known[name]


def token_grid(model: DualFormer, stage: int) -> Size:
  """Returns frames, rows and columns of the tokens of a stage."""
  side = model.image_size // (4 * 2**stage)
  return model.num_frames // 2, side, side


def gradcam(
  variables: Any,
  clips: Float[Array, 'v t h w 3'],
  label: Int[Array, ''],
  *,
  model: DualFormer,
  block: tuple[int, int],
  multi_label: bool = False,
) -> Float[Array, 'v t h w']:
  """Returns where a block sees a class (Grad-CAM, 1610.02391), from 0 to 1.

  What the block puts out is weighted by its gradient, which is averaged over
  rows and columns for each frame of tokens by itself, and summed over channels;
  what is negative becomes 0.

  Args:
    variables: parameters and BatchNorm statistics.
    clips: views of one video, normalised.
    label: number of the class; a negative one for the most probable class.
    model: the model.
    block: stage and place of the block.
    multi_label: as in training.step.eval_step.
  """
  name = 'blocks_{}_{}'.format(*block)

  def forward(clip):
    output, intermediates = model.apply(
      variables,
      clip[None],
      mutable=['intermediates'],
      capture_intermediates=lambda module, _: module.name == name,
    )
    sown: Any = intermediates
    [tokens] = sown['intermediates']['backbone'][name]['__call__']
    return output.logits[0], tokens

  # One view at a time: as much memory as for one clip.
  logits, tokens = jax.lax.map(forward, clips)
  activation = jax.nn.sigmoid if multi_label else jax.nn.softmax
  best = jnp.argmax(jnp.mean(activation(logits), axis=0))
  label = jnp.where(label < 0, best, label)

  def log_odds(tokens, clip):
    replaced = {'backbone': {f'{name}_output': tokens}}
    # Of the clip, which fixes shapes, nothing is computed anew.
    output: Any = model.apply({**variables, 'replaced': replaced}, clip[None])
    logits = output.logits[0]
    if multi_label:
      return logits[label]
    is_other = jnp.arange(logits.size) != label
    lowest = jnp.finfo(logits.dtype).min
    return logits[label] - jax.nn.logsumexp(jnp.where(is_other, logits, lowest))

  def view_map(view):
    clip, tokens = view
    # The gradient of the view's probability p (and so that of the mean over
    # views) is this times p (1 - p). A map from 0 to 1 is the same without the
    # factor, which would leave nothing where the model is certain.
    gradient = jax.grad(log_odds)(tokens, clip).astype(jnp.float32)
    weights = jnp.mean(gradient, axis=(2, 3), keepdims=True)
    heat = jax.nn.relu(jnp.sum(weights * tokens, axis=-1))[0]
    heat = jax.image.resize(heat, clip.shape[:3], 'linear')
    low, high = jnp.min(heat), jnp.max(heat)
    return (heat - low) / jnp.where(high > low, high - low, 1)

  return jax.lax.map(view_map, (clips, tokens))


def global_attention(
  variables: Any,
  clips: Float[Array, 'b t h w 3'],
  token: Int[Array, '3'],
  *,
  model: DualFormer,
  block: tuple[int, int],
) -> Float[Array, 'b frames rows columns']:
  """Returns how much of a query's attention goes to each token of a block.

  The mean over heads. The attention to a pooled token is shared out evenly
  among the tokens that it was pooled from; with that to both levels of the
  pyramid, the sum over tokens is 1.

  Args:
    variables: parameters and BatchNorm statistics.
    clips: normalised.
    token: frame, row and column of the query in the block's grid.
    model: the model.
    block: stage and place of the block, which attends globally (odd places).
  """
  stage = block[0]
  name = 'blocks_{}_{}'.format(*block)
  path = ('backbone', name, 'attn')
  _, intermediates = model.apply(
    variables,
    clips,
    mutable=['intermediates'],
    capture_intermediates=lambda module, _: (
      module.path in (path + ('q',), path + ('kv',))
    ),
  )
  sown: Any = intermediates
  sown = sown['intermediates']['backbone'][name]['attn']
  [q], [[k, _]] = sown['q']['__call__'], sown['kv']['__call__']
  heads = model.num_heads[stage]
  q = q[:, token[0], token[1], token[2]].astype(jnp.float32)
  q = rearrange(q, 'b (n e) -> b n e', n=heads)
  k = rearrange(k.astype(jnp.float32), 'b m (n e) -> b m n e', n=heads)
  scores = jnp.einsum(
    'bne,bmne->bnm',
    q * q.shape[-1] ** -0.5,
    k,
    precision=jax.lax.Precision.HIGHEST,
  )
  weights = jnp.mean(jax.nn.softmax(scores), axis=1)

  grid = token_grid(model, stage)
  levels = pyramid_kernels(
    grid, model.fine_sizes[stage], model.coarse_sizes[stage]
  ) or [((1, 1, 1),)]
  total = jnp.zeros((len(clips), *grid))
  for kernels in levels:
    # Of one level: how many tokens each of its own stands for, and their grid.
    kernel = [math.prod(sizes) for sizes in zip(*kernels, strict=True)]
    pooled = [g // s for g, s in zip(grid, kernel, strict=True)]
    level, weights = jnp.split(weights, [math.prod(pooled)], axis=1)
    level = level.reshape(-1, *pooled) / math.prod(kernel)
    for axis, size in enumerate(kernel, start=1):
      level = jnp.repeat(level, size, axis=axis)
    # The last rows and columns may be pooled into none.
    padding = [(0, g - n) for g, n in zip(grid, level.shape[1:], strict=True)]
    total += jnp.pad(level, [(0, 0), *padding])
  return total
