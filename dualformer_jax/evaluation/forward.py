"""The forward pass of evaluation: uint8 views to logits."""

from collections.abc import Callable, Sequence
import functools
from typing import Any

from einops import rearrange
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from dualformer_jax.distributed import sharding
from dualformer_jax.kernels.dispatch import device_count, platform
from dualformer_jax.models.dualformer import DualFormer

Normalize = Callable[[UInt8[Array, 'b t h w 3']], Float[Array, 'b t h w 3']]

# Views that an accelerator computes at a time.
_VIEWS_PER_DEVICE = 8


def normalize(
  clips: UInt8[Array, 'b t h w 3'] | Float[Array, 'b t h w 3'],
  pixel_mean: Sequence[float],
  pixel_std: Sequence[float],
) -> Float[Array, 'b t h w 3']:
  """Returns (clips - mean) / std by channel, on the scale 0..255."""
  mean, std = jnp.asarray(pixel_mean), jnp.asarray(pixel_std)
  return (clips.astype(jnp.float32) - mean) / std


def view_logits(
  variables: Any,
  views: UInt8[Array, 'b v t h w 3'],
  *,
  model: DualFormer,
  normalize: Normalize,
) -> Float[Array, 'b v k']:
  """Returns the class logits of each view of each video."""

  def score(clips):
    output: Any = model.apply(variables, normalize(clips))
    return output.logits

  return map_views(score, views)


def map_views(
  function: Callable[[UInt8[Array, 'b t h w 3']], Any],
  views: UInt8[Array, 'b v t h w 3'],
) -> Any:
  """Applies a function of a batch of clips to each view of each video.

  The arrays that it returns get the axes [b, v] in place of [b].
  """
  # As many views at a time as an accelerator needs to be busy, within the
  # memory of a training batch. A CPU is busy with one.
  batch, count = views.shape[:2]
  limit = 1
  if platform() != 'cpu':
    limit = max(1, _VIEWS_PER_DEVICE * device_count() // batch)
  group = max(n for n in range(1, count + 1) if count % n == 0 and n <= limit)
  groups = rearrange(views, 'b (i v) t h w c -> i (b v) t h w c', v=group)
  return jax.tree.map(
    lambda x: rearrange(x, 'i (b v) ... -> b (i v) ...', v=group),
    jax.lax.map(function, groups),
  )


@functools.cache  # so that validation and test share what is compiled
def make_eval_step(
  model: DualFormer,
  pixel_mean: tuple[float, ...],
  pixel_std: tuple[float, ...],
  mesh: jax.sharding.Mesh,
) -> Callable[..., jax.Array]:
  """Returns (variables, views) -> logits of each view, on all devices."""
  all_gather = sharding.all_gather_params(mesh)

  def eval_step(variables, views):
    return view_logits(
      all_gather(variables),
      views,
      model=model,
      normalize=lambda clips: normalize(clips, pixel_mean, pixel_std),
    )

  return jax.jit(
    eval_step,
    compiler_options=sharding.compiler_options(mesh),
    out_shardings=jax.NamedSharding(mesh, jax.P()),
  )
