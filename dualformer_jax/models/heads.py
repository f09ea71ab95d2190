"""Classification heads: from tokens to class scores."""

import flax.linen as nn
from jaxtyping import Array, Float

from dualformer_jax.models.layers import Linear


class ClassificationHead(nn.Module):
  """Mean over tokens, dropout, linear.

  Attributes:
    num_classes: number of classes, k.
    dropout: probability with which a pooled channel is dropped in training.
    dtype: what to compute in; scores come out as float32.
  """

  num_classes: int
  dropout: float
  dtype: str

  def setup(self):
    self.drop = nn.Dropout(self.dropout)
    self.fc_cls = Linear(self.num_classes, self.dtype, std=0.01)

  def __call__(
    self, features: Float[Array, 'b c'], train: bool = False
  ) -> Float[Array, 'b k']:
    features = self.drop(features, deterministic=not train)
    return self.fc_cls(features).astype('float32')

  def token_logits(
    self, tokens: Float[Array, 'b d h w c'], train: bool = False
  ) -> Float[Array, 'b d h w k']:
    """Returns what the classifier says of every token on its own, float32."""
    tokens = self.drop(tokens, deterministic=not train)
    return self.fc_cls(tokens).astype('float32')


class TokenLabelHead(ClassificationHead):
  """A classification head that can also score every token on its own.

  The token scores serve training with token labels; the class scores do not
  depend on them.

  Attributes:
    channels: channels of a token, c.
  """

  channels: int = 0

  def setup(self):
    super().setup()
    self.token_linear_0 = Linear(2 * self.channels, self.dtype)
    self.token_linear_3 = Linear(4 * self.channels, self.dtype)
    self.token_linear_6 = Linear(self.num_classes, self.dtype)

  def token_logits(
    self, tokens: Float[Array, 'b d h w c'], train: bool = False
  ) -> Float[Array, 'b d h w k']:
    """Returns class scores of every token by layers of their own, float32."""
    x = self.drop(self.token_linear_0(tokens), deterministic=not train)
    x = self.drop(self.token_linear_3(nn.relu(x)), deterministic=not train)
    return self.token_linear_6(nn.relu(x)).astype('float32')
