"""Classification heads."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dualformer_jax.kernels import mlp
from dualformer_jax.kernels.dispatch import Compute, matmul_precision
from dualformer_jax.kernels.layer_norm import layer_norm
from dualformer_jax.models.layers import LayerNorm, Linear, Mlp, Projections


class ClassificationHead(nn.Module):
  """Dropout, then a linear layer; scores are float32."""

  num_classes: int
  channels: int
  dropout: float
  compute: Compute

  def setup(self):
    self.drop = nn.Dropout(self.dropout)
    self.fc_cls = Linear(self.num_classes, self.compute, std=0.01)

  def __call__(
    self, features: Float[Array, 'b c'], train: bool = False
  ) -> Float[Array, 'b k']:
    """Returns the class scores of clips from the mean of their tokens."""
    features = self.drop(features, deterministic=not train)
    return self.fc_cls(features).astype('float32')

  def token_logits(
    self, tokens: Float[Array, 'b d h w c'], train: bool = False
  ) -> Float[Array, 'b d h w k']:
    """Returns class scores of each token from the classifier."""
    tokens = self.drop(tokens, deterministic=not train)
    return self.fc_cls(tokens).astype('float32')


class TokenLabelHead(ClassificationHead):
  """A head with separate layers that score each token, for token labels.

  Class scores do not depend on token scores.
  """

  def setup(self):
    super().setup()
    self.token_linear_0 = Linear(2 * self.channels, self.compute)
    self.token_linear_3 = Linear(4 * self.channels, self.compute)
    self.token_linear_6 = Linear(self.num_classes, self.compute)

  def token_logits(
    self, tokens: Float[Array, 'b d h w c'], train: bool = False
  ) -> Float[Array, 'b d h w k']:
    """Returns class scores of each token from the token layers."""
    x = self.drop(self.token_linear_0(tokens), deterministic=not train)
    x = self.drop(self.token_linear_3(nn.relu(x)), deterministic=not train)
    return self.token_linear_6(nn.relu(x)).astype('float32')


class CrossAttention(nn.Module):
  """Multi-head attention of a learned query to normalized tokens.

  Keys and values of the tokens are not computed. Instead, the query is
  multiplied by the kernel of the keys, and the mean of the tokens by that of
  the values, which is the same function with fewer operations. A bias of the
  keys would have no effect. The norm has no scale and bias, as the projections
  after it have them.
  """

  channels: int
  num_heads: int
  compute: Compute

  def setup(self):
    heads = self.num_heads, self.channels // self.num_heads
    init = nn.initializers.truncated_normal(0.02)
    self.query = self.param('query', init, (self.channels,))
    self.q = Linear(heads, self.compute)
    self.kv = Projections((2, *heads), self.compute)
    self.proj = Linear(self.channels, self.compute, inputs=heads)

  def __call__(self, tokens: Float[Array, 'b l c']) -> Float[Array, 'b c']:
    """Returns the query plus what it attended to."""
    b, _, c = tokens.shape
    n = self.num_heads
    (key_kernel, _), (value_kernel, value_bias) = self.kv.weights((b, c))
    query = self.query.astype(self.compute.dtype)
    q = self.q(query[None]).reshape(n, -1) * (c / n) ** -0.5
    x = layer_norm(tokens, jnp.ones(c), jnp.zeros(c), self.compute)
    q = _einsum('ne,cne->nc', q, key_kernel.reshape(c, n, -1))
    means = self.attend((q[None, None], x[None], x[None]))
    values = _einsum('bnc,cne->bne', means, value_kernel.reshape(c, n, -1))
    values = values.reshape(b, c) + value_bias.astype(x.dtype)
    return query + self.proj(values)

  def attend(
    self,
    qkv: tuple[
      Float[Array, '1 1 n c'], Float[Array, '1 b l c'], Float[Array, '1 b l c']
    ],
  ) -> Float[Array, 'b n c']:
    """Returns the attended mean of the tokens for each head."""
    [[q]], [k], [v] = qkv
    weights = jax.nn.softmax(_einsum('nc,blc->bnl', q, k).astype(jnp.float32))
    return _einsum('bnl,blc->bnc', weights.astype(v.dtype), v)


def _einsum(
  equation: str, x: Float[Array, '...'], y: Float[Array, '...']
) -> Float[Array, '...']:
  """Returns products in the dtype of `x`."""
  precision = matmul_precision(x.dtype)
  return jnp.einsum(equation, x, y.astype(x.dtype), precision=precision)


class AttentiveHead(nn.Module):
  """Cross-attention and an MLP pool the tokens, then a linear layer scores.

  This is the attentive probe of V-JEPA (arXiv 2404.08471): one pre-norm block,
  with one learned query.
  """

  num_classes: int
  channels: int
  num_heads: int
  dropout: float
  compute: Compute

  def setup(self):
    self.attn = CrossAttention(self.channels, self.num_heads, self.compute)
    self.norm2 = LayerNorm(self.compute)
    self.mlp = Mlp(self.compute)
    self.drop = nn.Dropout(self.dropout)
    self.fc_cls = Linear(self.num_classes, self.compute, std=0.01)

  def __call__(
    self, tokens: Float[Array, 'b l c'], train: bool = False
  ) -> Float[Array, 'b k']:
    """Returns the class scores of clips from their tokens."""
    x = self.attn(tokens)[:, None, None, None]
    norm, layers = self.norm2.weights(x.shape), self.mlp.weights(x.shape)
    x = mlp.composed(x, None, norm, *layers, self.compute)[:, 0, 0, 0]
    return self.fc_cls(self.drop(x, deterministic=not train)).astype('float32')

  def token_logits(
    self, tokens: Float[Array, 'b d h w c'], train: bool = False
  ) -> Float[Array, 'b d h w k']:
    """Returns class scores of each token, as if it were the only one."""
    scores = self(tokens.reshape(-1, 1, self.channels), train)
    return scores.reshape(*tokens.shape[:-1], -1)
