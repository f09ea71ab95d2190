"""Explains predictions: Grad-CAM and the weights of global attention."""

import functools
import math
import re
from typing import Any

from einops import rearrange
from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dualformer_jax.errors import UserError
from dualformer_jax.models.attention import pyramid_kernels
from dualformer_jax.models.dualformer import DualFormer


def find_block(model: DualFormer, layer: str) -> tuple[int, int]:
  """Returns stage and index in the stage of a block, such as 'blocks.3.1'.

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


def last_layer(model: DualFormer) -> str:
  """Returns the name of the last block, such as 'blocks.3.1'."""
  return f'blocks.{len(model.depths) - 1}.{model.depths[-1] - 1}'


@functools.partial(jax.jit, static_argnames=('model', 'paths'))
def apply_and_capture(
  model: DualFormer, variables: Any, clips: Any, paths: tuple[str, ...]
) -> tuple[Any, list[Any]]:
  """Returns the output, and those of modules at paths in the backbone."""
  names = [('backbone', *path.split('/')) for path in paths]
  output, state = model.apply(
    variables,
    clips,
    mutable=['intermediates'],
    capture_intermediates=lambda module, _: module.path in names,
  )
  outputs: Any = flatten_dict(state['intermediates'])
  return output, [outputs[(*name, '__call__')][0] for name in names]


@functools.partial(jax.jit, static_argnames=('model', 'block', 'multi_label'))
def gradcam(
  model: DualFormer,
  variables: Any,
  clips: Float[Array, 'v t h w 3'],
  label: Int[Array, ''],
  block: tuple[int, int],
  multi_label: bool,
) -> Float[Array, 'v t h w']:
  """Computes Grad-CAM (arXiv 1610.02391) of a class at the output of a block.

  The weights of channels are gradients averaged over rows and columns, for
  each frame of tokens separately. The weighted sum over channels, with negative
  values set to 0, is resized to the clip and scaled to 0..1.

  A negative label is the most probable class. See Recognizer.gradcam.
  """
  name = 'blocks_{}_{}'.format(*block)

  def forward(clip):
    output, [tokens] = apply_and_capture(model, variables, clip[None], (name,))
    return output.logits[0], tokens

  # One view at a time, to use no more memory than one clip takes.
  logits, tokens = jax.lax.map(forward, clips)
  activation = jax.nn.sigmoid if multi_label else jax.nn.softmax
  best = jnp.argmax(jnp.mean(activation(logits), axis=0))
  label = jnp.where(label < 0, best, label)

  def log_odds(tokens, clip):
    replaced = {'backbone': {f'{name}_output': tokens}}
    # The clip only fixes shapes: the blocks before `name` are not computed.
    output: Any = model.apply({**variables, 'replaced': replaced}, clip[None])
    logits = output.logits[0]
    if multi_label:
      return logits[label]
    is_other = jnp.arange(logits.size) != label
    lowest = jnp.finfo(logits.dtype).min
    return logits[label] - jax.nn.logsumexp(jnp.where(is_other, logits, lowest))

  def view_map(view):
    clip, tokens = view
    # The gradient of the view's probability p, and of the mean over views, is
    # this gradient times p (1 - p). The factor cancels when maps are scaled to
    # 0..1, and would underflow where the model is certain.
    gradient = jax.grad(log_odds)(tokens, clip).astype(jnp.float32)
    weights = jnp.mean(gradient, axis=(2, 3), keepdims=True)
    heat = jax.nn.relu(jnp.sum(weights * tokens, axis=-1))[0]
    heat = jax.image.resize(heat, clip.shape[:3], 'linear')
    low, high = jnp.min(heat), jnp.max(heat)
    return (heat - low) / jnp.where(high > low, high - low, 1)

  return jax.lax.map(view_map, (clips, tokens))


@functools.partial(jax.jit, static_argnames=('model', 'block'))
def global_attention(
  model: DualFormer,
  variables: Any,
  clips: Float[Array, 'b t h w 3'],
  token: Int[Array, '3'],
  block: tuple[int, int],
) -> Float[Array, 'b frames rows columns']:
  """Computes the attention of a token in a block; see Recognizer.attention."""
  stage = block[0]
  name = 'blocks_{}_{}'.format(*block)
  _, [q, (k, _)] = apply_and_capture(
    model, variables, clips, (f'{name}/attn/q', f'{name}/attn/kv')
  )
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

  grid = model.token_grid(stage)
  levels = pyramid_kernels(
    grid, model.fine_sizes[stage], model.coarse_sizes[stage]
  ) or [((1, 1, 1),)]
  total = jnp.zeros((len(clips), *grid))
  for kernels in levels:
    # Tokens pooled into one token of this level, and the grid of the level.
    kernel = [math.prod(sizes) for sizes in zip(*kernels, strict=True)]
    pooled = [g // s for g, s in zip(grid, kernel, strict=True)]
    level, weights = jnp.split(weights, [math.prod(pooled)], axis=1)
    share = jnp.full((1, *kernel), 1 / math.prod(kernel))
    level = jnp.kron(level.reshape(-1, *pooled), share)
    # The last rows and columns may not be pooled into any token.
    padding = [(0, g - n) for g, n in zip(grid, level.shape[1:], strict=True)]
    total += jnp.pad(level, [(0, 0), *padding])
  return total
