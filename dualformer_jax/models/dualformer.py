"""DualFormer, the local-global stratified transformer (arXiv 2112.04674)."""

import functools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray
import numpy as np

from dualformer_jax.errors import UserError
from dualformer_jax.kernels import recompute
from dualformer_jax.kernels.attention import attention
from dualformer_jax.kernels.dispatch import Compute, Size
from dualformer_jax.kernels.layer_norm import layer_norm
from dualformer_jax.kernels.mlp import add_branch, mlp_branch
from dualformer_jax.models.attention import (
  GlobalPyramidAttention,
  LocalWindowAttention,
)
from dualformer_jax.models.heads import (
  AttentiveHead,
  ClassificationHead,
  TokenLabelHead,
)
from dualformer_jax.models.layers import (
  LayerNorm,
  Mlp,
  PatchEmbedding,
  PositionalConvolution,
)

REMAT_MODES = ('none', 'elementwise', 'block')


class Block(nn.Module):
  """x + attn(norm1(x)), then x + mlp(norm2(x)).

  Attention is local in windows, or global if `window` is None. `remat` selects
  what the backward pass recomputes:

  - 'none' recomputes nothing but attention scores (with kernels='auto').
  - 'elementwise' saves the outputs of attention and of matrix products, except
    those that are quickly recomputed: norms, GELU, pooled tokens and drop path.
    It adds few FLOPs and uses less than half of the memory of 'none'.
  - 'block' saves only the input of each block: the least memory, and a third
    more arithmetic.
  """

  channels: int
  num_heads: int
  grid: Size
  window: Size | None
  fine_size: Size
  coarse_size: Size | None
  remat: str
  compute: Compute

  def setup(self):
    common = self.channels, self.num_heads, self.grid
    self.norm1 = LayerNorm(self.compute)
    if self.window is not None:
      self.attn = LocalWindowAttention(*common, self.window, self.compute)
    else:
      self.attn = GlobalPyramidAttention(
        *common, self.fine_size, self.coarse_size, self.compute
      )
    self.norm2 = LayerNorm(self.compute)
    self.mlp = Mlp(self.compute)

  def __call__(
    self,
    x: Float[Array, 'b d h w c'],
    train: bool,
    branch_scales: Float[Array, '2 b'] | None = None,
  ) -> Float[Array, 'b d h w c']:
    """Returns the tokens; `branch_scales` are from `drop_path`."""

    def scale(branch):
      if branch_scales is None:
        return None
      return jax.lax.stop_gradient(branch_scales[branch])

    def project(block, x):
      return block.attn.project(block.norm1(x), train)

    def project_fused(block, x):
      norm = block.norm1.weights(x.shape)
      return block.attn.project_fused(projections, x, norm, train)

    def project_keys(block, x, norm):
      norm_scale, norm_bias = norm
      x = layer_norm(x, norm_scale, norm_bias, self.compute)
      return block.attn.project_keys(x, train)

    def project_levels(block, levels):
      return block.attn.project_levels(levels, train)

    def feed_forward(block, x):
      norm = block.norm2.weights(x.shape)
      fc1, fc2 = block.mlp.weights(x.shape)
      return mlp_branch(x, scale(1), norm, fc1, fc2, self.compute)

    if self.remat == 'elementwise':
      project, project_fused, project_keys, project_levels, feed_forward = (
        recompute.recomputed(
          function, self.compute, ('hidden', 'levels', 'prepared')
        )
        for function in (
          project,
          project_fused,
          project_keys,
          project_levels,
          feed_forward,
        )
      )
    # Outputs of layers can be captured only if they are called.
    captures = self.is_mutable_collection('intermediates')
    branch = None if captures else self.attn.find_branch(len(x))
    projections = None if captures else self.attn.find_projections(len(x))
    if branch:
      norm = self.norm1.weights(x.shape)
      if self.window:
        keys = ()
      elif norm_pool := self.attn.find_norm_pool(len(x)):
        weights = self.attn.pooling_weights(x.shape)
        x, levels = norm_pool(x, norm, weights)
        keys = project_levels(self, levels)
      else:
        keys = project_keys(self, x, norm)
      weights = self.attn.weights(x.shape)
      x = branch(x, scale(0), norm, *weights, keys)
    elif projections:
      x, *qkv = project_fused(self, x)
      layers, layer = self.attn.weights(x.shape)
      if projections.attention:
        norm = self.norm1.weights(x.shape)
        x = projections.attend_add(x, qkv, scale(0), norm, layers[0], layer)
      else:
        q, k, v = (y[None] for y in qkv)
        y = attention(q, k, v, self.num_heads, self.compute)[0]
        x = projections.project_add(x, y, scale(0), layer)
    else:
      x = add_branch(x, scale(0), self.attn.attend(project(self, x)))
    return feed_forward(self, x)


def _run_block(
  block: Block,
  x: Float[Array, 'b d h w c'],
  train: bool,
  branch_scales: Float[Array, '2 b'] | None,
) -> Float[Array, 'b d h w c']:
  """Calls a block; the backward pass recomputes what `block.remat` selects."""

  def call(block, x, branch_scales):
    return block(x, train, branch_scales)

  if block.remat == 'block':
    call = recompute.recomputed(call, block.compute)
  if block.remat != 'none':
    call = recompute.isolated(call, block.compute)
  return call(block, x, branch_scales)


def drop_path(
  key: PRNGKeyArray, rates: Float[np.ndarray, 'n'], batch: int
) -> Float[Array, 'n 2 b']:
  """Draws the factors of stochastic depth, whose mean is 1 (arXiv 1603.09382).

  For both branches of each block and for each sample, 0 with the probability of
  the block's rate, otherwise 1 / (1 - rate).
  """
  keep = jnp.asarray(1 - rates, jnp.float32)[:, None, None]
  kept = jax.random.bernoulli(key, keep, (len(rates), 2, batch))
  return jnp.where(kept, 1 / keep, 0)


class Backbone(nn.Module):
  """Stages of a patch embedding and blocks; for the fields see DualFormer.

  A variable blocks_I_J_output of the collection 'replaced' replaces the output
  of that block. This gives gradients with respect to it.
  """

  depths: tuple[int, ...]
  embed_dims: tuple[int, ...]
  num_heads: tuple[int, ...]
  window: Size
  fine_sizes: tuple[Size, ...]
  coarse_sizes: tuple[Size | None, ...]
  drop_path_rate: float
  remat: str
  compute: Compute

  @nn.compact
  def __call__(
    self, x: Float[Array, 'b t y x 3'], train: bool
  ) -> Float[Array, 'b d h w c']:
    # Initialization has no backward pass, and is traced in half of the time.
    remat = 'none' if self.is_initializing() else self.remat
    scales = iter([None] * sum(self.depths))
    if train and self.drop_path_rate:
      rates = np.linspace(0, self.drop_path_rate, sum(self.depths))
      scales = iter(drop_path(self.make_rng('dropout'), rates, x.shape[0]))
    for stage, depth in enumerate(self.depths):
      x = PatchEmbedding(
        (2, 4, 4) if stage == 0 else (1, 2, 2),
        self.embed_dims[stage],
        self.compute,
        name=f'patch_embeds_{stage}',
      )(x)
      _, d, h, w, _ = x.shape
      for index in range(depth):
        name = f'blocks_{stage}_{index}'
        block = Block(
          self.embed_dims[stage],
          self.num_heads[stage],
          (d, h, w),
          self.window if index % 2 == 0 else None,
          self.fine_sizes[stage],
          self.coarse_sizes[stage],
          remat,
          self.compute,
          name=name,
        )
        x = _run_block(block, x, train, next(scales))
        if self.has_variable('replaced', f'{name}_output'):
          x = self.get_variable('replaced', f'{name}_output')
        if index == 0:
          name = f'pos_block_{stage}'
          x = PositionalConvolution(self.compute, name=name)(x)
      self.sow('intermediates', f'stage_{stage}', x)
    return LayerNorm(self.compute, name='norm')(x)


@flax.struct.dataclass
class Output:
  """The output for a batch of clips, in float32.

  `features`, the mean over tokens, are the input of the linear head.
  `token_logits` are from the token head or, without one, from the classifier;
  None if they were not requested.
  """

  logits: Float[Array, 'b k']
  features: Float[Array, 'b c']
  token_logits: Float[Array, 'b d h w k'] | None


def _check(model: nn.Module, name: str, is_valid: bool, expected: str) -> None:
  """Raises UserError unless the value of the field `name` is valid."""
  if not is_valid:
    value = getattr(model, name)
    raise UserError(f'model.{name} is {value!r}; expected {expected}')


class DualFormer(nn.Module):
  """A video classifier: backbone and head.

  The fields are those of `config.model`. Sizes are (frames, rows, columns) of
  tokens. `num_frames` and `image_size` determine the sizes of pooling kernels.

  Attributes:
    depths: blocks of each stage; blocks 0, 2, ... of a stage attend locally,
      blocks 1, 3, ... globally.
    embed_dims: channels of each stage.
    num_heads: attention heads of each stage.
    num_classes: number of classes.
    num_frames: frames of a clip, t.
    image_size: rows and columns of a clip, in pixels.
    window: window of local attention.
    fine_sizes: fine level of the pyramid of each stage.
    coarse_sizes: coarse level of each stage, None without one.
    drop_path_rate: rate of the last block; it rises linearly from 0.
    head: 'linear' scores the mean of the tokens, 'attentive' pools them by
      cross-attention.
    head_dropout: probability of dropping a channel before the classifier.
    token_label: whether the head also scores each token.
    remat: what the backward pass recomputes; see Block.
    dtype: 'float32' or 'bfloat16' for activations; parameters, norms and
      softmax are always float32.
    kernels: 'auto' for the fastest implementations of operations,
      'experimental' also for those that have not been run on a device yet,
      'reference' for plain ones; see dualformer_jax/kernels.
  """

  depths: tuple[int, ...]
  embed_dims: tuple[int, ...]
  num_heads: tuple[int, ...]
  num_classes: int
  num_frames: int = 32
  image_size: int = 224
  window: Size = (8, 7, 7)
  fine_sizes: tuple[Size, ...] = ((8, 7, 7), (8, 7, 7), (8, 7, 7), (16, 7, 7))
  coarse_sizes: tuple[Size | None, ...] = ((4, 4, 4), (4, 4, 4), None, None)
  drop_path_rate: float = 0.0
  head: str = 'linear'
  head_dropout: float = 0.5
  token_label: bool = False
  remat: str = 'elementwise'
  dtype: str = 'bfloat16'
  kernels: str = 'auto'

  def __post_init__(self):
    super().__post_init__()
    check = functools.partial(_check, self)
    stages = len(self.depths)
    for name in ('embed_dims', 'num_heads', 'fine_sizes', 'coarse_sizes'):
      is_valid = len(getattr(self, name)) == stages
      check(
        name, is_valid, f'{stages} values, one for each stage (model.depths)'
      )
    for c, heads in zip(self.embed_dims, self.num_heads, strict=True):
      is_multiple = c > 0 and heads > 0 and c % heads == 0
      expected = f'multiples of model.num_heads, {self.num_heads}'
      check('embed_dims', is_multiple, expected)
    smallest = 4 * 2 ** (stages - 1)  # leaves one token
    check('num_frames', self.num_frames >= 2, 'at least 2')
    check('image_size', self.image_size >= smallest, f'at least {smallest}')
    for name, values in (
      ('head', ('linear', 'attentive')),
      ('remat', REMAT_MODES),
      ('dtype', ('float32', 'bfloat16')),
      ('kernels', ('auto', 'experimental', 'reference')),
    ):
      check(name, getattr(self, name) in values, f'one of {values}')
    if self.token_label:
      check('head', self.head == 'linear', "'linear' with model.token_label")

  @nn.compact
  def __call__(
    self,
    clips: Float[Array, 'b t y x 3'],
    train: bool = False,
    score_tokens: bool = False,
  ) -> Output:
    """Scores clips; `token_logits` need `token_label` or `score_tokens`."""
    expected = (self.num_frames, self.image_size, self.image_size, 3)
    if clips.shape[1:] != expected:
      raise ValueError(
        f'clips have shape {clips.shape}; expected [batch, '
        f'{", ".join(map(str, expected))}] for this model: set '
        'model.num_frames and model.image_size, or sample and crop to these'
      )
    tokens = self.make_backbone(name='backbone')(
      clips.astype(self.dtype), train
    )
    features = jnp.mean(tokens, axis=(1, 2, 3), dtype=jnp.float32)
    head = self.make_head(name='cls_head')
    if isinstance(head, AttentiveHead):
      logits = head(tokens.reshape(len(tokens), -1, tokens.shape[-1]), train)
    else:
      logits = head(features, train)
    token_logits = None
    if self.token_label or score_tokens:
      token_logits = head.token_logits(tokens, train)
    return Output(logits, features, token_logits)

  @nn.nowrap
  def make_backbone(self, name: str | None = None) -> Backbone:
    """Returns the backbone, which maps clips in `dtype` to tokens."""
    return Backbone(
      self.depths,
      self.embed_dims,
      self.num_heads,
      self.window,
      self.fine_sizes,
      self.coarse_sizes,
      self.drop_path_rate,
      self.remat,
      Compute(self.dtype, self.kernels),
      name=name,
    )

  @nn.nowrap
  def make_head(
    self, name: str | None = None
  ) -> ClassificationHead | AttentiveHead:
    """Returns the head, which maps tokens or their mean to class scores."""
    size = self.num_classes, self.embed_dims[-1]
    rest = self.head_dropout, Compute(self.dtype, self.kernels)
    if self.head == 'attentive':
      return AttentiveHead(*size, self.num_heads[-1], *rest, name=name)
    head_class = TokenLabelHead if self.token_label else ClassificationHead
    return head_class(*size, *rest, name=name)

  def input_shape(self) -> tuple[int, int, int, int, int]:
    """Returns the shape of a batch of one clip."""
    return (1, self.num_frames, self.image_size, self.image_size, 3)

  def token_grid(self, stage: int = -1) -> Size:
    """Returns the frames, rows and columns of the tokens of a stage."""
    side = self.image_size // (4 * 2 ** (stage % len(self.depths)))
    return self.num_frames // 2, side, side
