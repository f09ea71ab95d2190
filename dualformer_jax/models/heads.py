"""Classification heads."""

import flax.linen as nn
from jaxtyping import Array, Float

from dualformer_jax.kernels.dispatch import Compute
from dualformer_jax.models.layers import Linear


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
