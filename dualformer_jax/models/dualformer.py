"""DualFormer, the local-global stratified video transformer (2112.04674)."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import mlir
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray
import numpy as np

from dualformer_jax.errors import UserError
from dualformer_jax.models.attention import (
  GlobalPyramidAttention,
  LocalWindowAttention,
)
from dualformer_jax.models.heads import ClassificationHead, TokenLabelHead
from dualformer_jax.models.layers import (
  LayerNorm,
  Linear,
  PatchEmbedding,
  PositionalConvolution,
  Size,
  platform,
)


def gelu(x: Float[Array, '...']) -> Float[Array, '...']:
  """The exact GELU, by erf: as PyTorch does, and less work than by erfc.

  Computed in float32, as bfloat16 has too few digits for its constants.
  """
  y = x.astype(jnp.float32)
  return (0.5 * y * (1 + jax.lax.erf(y * 0.5**0.5))).astype(x.dtype)


class Mlp(nn.Module):
  """Linear to four times the channels, exact GELU, linear back."""

  dtype: str

  @nn.compact
  def __call__(self, x: Float[Array, 'b d h w c']) -> Float[Array, 'b d h w c']:
    channels = x.shape[-1]
    x = Linear(4 * channels, self.dtype, name='fc1')(x)
    x = gelu(checkpoint_name(x, 'hidden'))
    return Linear(channels, self.dtype, name='fc2')(x)


class Block(nn.Module):
  """Attention, then MLP; each normalised before and added to its input.

  Attributes:
    num_heads: attention heads.
    window: window of local attention, or None for global attention.
    fine_size: tokens that the fine level of the pyramid is pooled to.
    coarse_size: the same of the coarse level, or None without one.
    dtype: what to compute in.
  """

  num_heads: int
  window: Size | None
  fine_size: Size
  coarse_size: Size | None
  dtype: str

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'b d h w c'],
    train: bool,
    branch_scales: Float[Array, '2 b'] | None = None,
  ) -> Float[Array, 'b d h w c']:
    """Returns tokens; `branch_scales`, by `drop_path`, multiply branches."""

    def scaled(y, branch):
      if branch_scales is None:
        return y
      scale = branch_scales[branch].astype(y.dtype)
      return y * scale[:, None, None, None, None]

    y = LayerNorm(self.dtype, name='norm1')(x)
    if self.window is not None:
      attention = LocalWindowAttention(
        self.num_heads, self.window, self.dtype, name='attn'
      )
      y = attention(y)
    else:
      attention = GlobalPyramidAttention(
        self.num_heads,
        self.fine_size,
        self.coarse_size,
        self.dtype,
        name='attn',
      )
      y = attention(y, train)
    x = checkpoint_name(x + scaled(y, 0), 'attended')
    y = LayerNorm(self.dtype, name='norm2')(x)
    return x + scaled(Mlp(self.dtype, name='mlp')(y), 1)


def drop_path(
  key: PRNGKeyArray, rates: Float[np.ndarray, 'n'], batch: int
) -> Float[Array, 'n 2 b']:
  """Returns what to multiply each branch of n blocks by, for each sample.

  That is 0 at a block's rate, and 1 / (1 - rate) otherwise (stochastic depth,
  1603.09382, scaled so that the mean is 1).
  """
  keep = jnp.asarray(1 - rates, jnp.float32)[:, None, None]
  kept = jax.random.bernoulli(key, keep, (len(rates), 2, batch))
  return jnp.where(kept, 1 / keep, 0)


def run_block(
  block: Block,
  x: Float[Array, 'b d h w c'],
  train: bool,
  branch_scales: Float[Array, '2 b'] | None,
  remat: str,
) -> Float[Array, 'b d h w c']:
  """Returns what the block makes of x.

  `remat` says what the backward pass recomputes.

  'none': keeps all activations but the attention scores.
  'elementwise': keeps what matrix products and attention put out, and makes
    norms, GELU, pooled tokens and drop path anew: little arithmetic, more than
    half of the memory.
  'block': keeps only the input of each block: least memory, a third more
    arithmetic.
  """

  def call(block, x, branch_scales):
    return block(x, train, branch_scales)

  if remat == 'none':
    return call(block, x, branch_scales)
  policy = None
  if remat == 'elementwise':
    policies = jax.checkpoint_policies
    policy = policies.save_from_both_policies(
      policies.save_only_these_names('qkv', 'attention', 'attended', 'hidden'),
      # What cuDNN's attention puts out, which has no name.
      lambda primitive, *_, **__: primitive.name.startswith(
        'dot_product_attention_fwd'
      ),
    )

  on_cpu = platform() == 'cpu'
  checkpointed = nn.remat(call, policy=policy, prevent_cse=not on_cpu)
  if not on_cpu:
    return checkpointed(block, x, branch_scales)

  def forward(block, x, branch_scales):
    return nn.vjp(checkpointed, block, x, branch_scales)

  def backward(pullback, dy):
    # In a function that is not inlined. Otherwise XLA on a CPU sees that
    # forward and recomputation are the same, does the work once, and keeps all;
    # and it computes the sum dy, which has a term from each later block, again
    # from its terms wherever it is used.
    gradients = jax.jit(lambda pullback, dy: pullback(dy))(pullback, dy)
    return set_xla_metadata(gradients, inlineable='false')

  run = nn.custom_vjp(call, forward, backward, grad_vars='params')
  return run(block, x, branch_scales)


def _lower_reduce_precision(
  _: mlir.LoweringRuleContext,
  x: ir.Value,
  *,
  exponent_bits: int,
  mantissa_bits: int,
) -> list[ir.Value]:
  """Lowers reduce_precision on CPUs, to nothing where it changes nothing.

  With it jax.checkpoint marks what it keeps, as some compilers use more digits
  than they keep. XLA on a CPU copies what is marked.
  """
  element_type = ir.RankedTensorType(x.type).element_type
  own_bits = {ir.F32Type: (8, 23), ir.BF16Type: (8, 7)}.get(type(element_type))
  if own_bits == (exponent_bits, mantissa_bits):
    return [x]
  return [stablehlo.reduce_precision(x, exponent_bits, mantissa_bits)]


mlir.register_lowering(
  jax.lax.reduce_precision_p, _lower_reduce_precision, platform='cpu'
)


class Backbone(nn.Module):
  """Four stages of patch embedding and blocks; see DualFormer.

  What the block blocks_I_J puts out is replaced by the variable of that name
  and '_output' in the collection 'replaced', where it is given: that is how to
  get gradients with respect to it.
  """

  depths: tuple[int, ...]
  embed_dims: tuple[int, ...]
  num_heads: tuple[int, ...]
  window: Size
  fine_sizes: tuple[Size, ...]
  coarse_sizes: tuple[Size | None, ...]
  drop_path_rate: float
  remat: str
  dtype: str

  @nn.compact
  def __call__(
    self, x: Float[Array, 'b t y x 3'], train: bool
  ) -> Float[Array, 'b d h w c']:
    scales = iter([None] * sum(self.depths))
    if train and self.drop_path_rate:
      rates = np.linspace(0, self.drop_path_rate, sum(self.depths))
      scales = iter(drop_path(self.make_rng('dropout'), rates, x.shape[0]))
    for stage, depth in enumerate(self.depths):
      x = PatchEmbedding(
        (2, 4, 4) if stage == 0 else (1, 2, 2),
        self.embed_dims[stage],
        self.dtype,
        name=f'patch_embeds_{stage}',
      )(x)
      for index in range(depth):
        name = f'blocks_{stage}_{index}'
        block = Block(
          self.num_heads[stage],
          self.window if index % 2 == 0 else None,
          self.fine_sizes[stage],
          self.coarse_sizes[stage],
          self.dtype,
          name=name,
        )
        x = run_block(block, x, train, next(scales), self.remat)
        if self.has_variable('replaced', f'{name}_output'):
          x = self.get_variable('replaced', f'{name}_output')
        if index == 0:
          name = f'pos_block_{stage}'
          x = PositionalConvolution(self.dtype, name=name)(x)
      self.sow('intermediates', f'stage_{stage}', x)
    return LayerNorm(self.dtype, name='norm')(x)


@flax.struct.dataclass
class Output:
  """What the model says of a batch of clips, all float32.

  Attributes:
    logits: class scores.
    features: what the head sees: the mean over tokens.
    token_logits: class scores of every token, by the token head or, without
      one, by the classifier; None where neither was asked for.
  """

  logits: Float[Array, 'b k']
  features: Float[Array, 'b c']
  token_logits: Float[Array, 'b d h w k'] | None


class DualFormer(nn.Module):
  """A video classifier: backbone and head.

  The fields are those of `config.model`. Sizes are (frames, rows, columns) of
  tokens. `num_frames` and `image_size` fix the shapes of the pooling kernels.

  Attributes:
    depths: blocks of each stage; even blocks attend locally, odd globally.
    embed_dims: channels of each stage.
    num_heads: attention heads of each stage.
    num_classes: classes, k.
    num_frames: frames of a clip, t.
    image_size: rows and columns of a clip, in pixels.
    window: window of local attention.
    fine_sizes: fine level of the pyramid of each stage.
    coarse_sizes: coarse level of each stage, None without one.
    drop_path_rate: of the last block; rises linearly from 0 over all blocks.
    head_dropout: probability of dropping a channel before the classifier.
    token_label: whether the head also scores every token.
    remat: 'none', 'elementwise' or 'block'; see `run_block`.
    dtype: 'float32' or 'bfloat16', what to compute in; parameters, norms and
      softmax are float32 in any case.
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
  head_dropout: float = 0.5
  token_label: bool = False
  remat: str = 'elementwise'
  dtype: str = 'bfloat16'

  def __post_init__(self):
    super().__post_init__()
    stages = len(self.depths)
    for name in ('embed_dims', 'num_heads', 'fine_sizes', 'coarse_sizes'):
      if len(getattr(self, name)) != stages:
        raise UserError(
          f'model.{name} is {getattr(self, name)}; expected {stages} values, '
          f'one for each stage, as model.depths is {self.depths}'
        )
    for channels, heads in zip(self.embed_dims, self.num_heads, strict=True):
      if heads < 1 or channels < 1 or channels % heads:
        raise UserError(
          f'model.embed_dims is {self.embed_dims}; expected multiples of '
          f'model.num_heads, {self.num_heads}'
        )
    smallest = 4 * 2 ** (stages - 1)  # of which one token is left
    if self.num_frames < 2 or self.image_size < smallest:
      raise UserError(
        f'model.num_frames is {self.num_frames} and model.image_size '
        f'{self.image_size}; expected at least 2 frames and {smallest} pixels'
      )
    for name, values in (
      ('remat', ('none', 'elementwise', 'block')),
      ('dtype', ('float32', 'bfloat16')),
    ):
      if getattr(self, name) not in values:
        raise UserError(
          f'model.{name} is {getattr(self, name)!r}; expected one of '
          f'{", ".join(map(repr, values))}'
        )

  @nn.compact
  def __call__(
    self,
    clips: Float[Array, 'b t y x 3'],
    train: bool = False,
    score_tokens: bool = False,
  ) -> Output:
    """Scores clips, and tokens where the head does that or `score_tokens`."""
    expected = (self.num_frames, self.image_size, self.image_size, 3)
    if clips.shape[1:] != expected:
      raise ValueError(
        f'clips have shape {clips.shape}; this model takes [batch, '
        f'{", ".join(map(str, expected))}]: set model.num_frames and '
        'model.image_size, or sample and crop to these'
      )
    tokens = Backbone(
      self.depths,
      self.embed_dims,
      self.num_heads,
      self.window,
      self.fine_sizes,
      self.coarse_sizes,
      self.drop_path_rate,
      self.remat,
      self.dtype,
      name='backbone',
    )(clips.astype(self.dtype), train)
    features = jnp.mean(tokens, axis=(1, 2, 3), dtype=jnp.float32)
    settings: dict[str, Any] = dict(
      num_classes=self.num_classes,
      dropout=self.head_dropout,
      dtype=self.dtype,
      name='cls_head',
    )
    if self.token_label:
      head = TokenLabelHead(**settings, channels=self.embed_dims[-1])
    else:
      head = ClassificationHead(**settings)
    logits, token_logits = head(features, train), None
    if self.token_label or score_tokens:
      token_logits = head.token_logits(tokens, train)
    return Output(logits, features, token_logits)

  def input_shape(self) -> tuple[int, int, int, int, int]:
    """Returns the shape of a batch of one clip."""
    return (1, self.num_frames, self.image_size, self.image_size, 3)
