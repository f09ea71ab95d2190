"""What happens to uint8 clips on the accelerator, before the model."""

from collections.abc import Sequence

import dm_pix
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, UInt8


def normalize(
  clips: UInt8[Array, 'b t h w 3'],
  pixel_mean: Sequence[float],
  pixel_std: Sequence[float],
) -> Float[Array, 'b t h w 3']:
  """Returns (clips - mean) / std, channel by channel, float32.

  Args:
    clips: RGB, 0..255.
    pixel_mean: what to subtract, on the same scale.
    pixel_std: what to divide by.
  """
  mean, std = jnp.asarray(pixel_mean), jnp.asarray(pixel_std)
  return (clips.astype(jnp.float32) - mean) / std


def augment(
  key: PRNGKeyArray,
  clips: UInt8[Array, 'b t h w 3'],
  pixel_mean: Sequence[float],
  pixel_std: Sequence[float],
  *,
  flip: bool,
) -> Float[Array, 'b t h w 3']:
  """Returns normalised training clips, each mirrored half of the time.

  Args:
    key: one key for the batch; each clip has its own, the same for all of its
      frames.
    clips: RGB, 0..255.
    pixel_mean: as in `normalize`.
    pixel_std: as in `normalize`.
    flip: whether to mirror left and right at random.
  """
  if flip:
    keys = jax.random.split(key, clips.shape[0])
    clips = jnp.asarray(jax.vmap(dm_pix.random_flip_left_right)(keys, clips))
  return normalize(clips, pixel_mean, pixel_std)
