"""One step of training, and one of evaluation, as pure functions."""

from collections.abc import Callable
import re
from typing import Any

from einops import rearrange
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8
import optax

from dualformer_jax.models.dualformer import DualFormer
from dualformer_jax.models.layers import platform
from dualformer_jax.training import losses

Augment = Callable[..., Float[Array, 'b t h w 3']]
Labels = Int[Array, 'b'] | Float[Array, 'b k']
Mix = Callable[
  [PRNGKeyArray, Float[Array, 'b t h w 3'], Labels],
  tuple[Float[Array, 'b t h w 3'], Labels],
]
# (key, the teacher's variables, clips, the rest of the batch) -> soft labels
TokenTargets = Callable[..., Float[Array, 'b d h w k']]
# For each device, when scoring the views of videos.
_CLIPS_AT_A_TIME = 8

Normalize = Callable[[UInt8[Array, 'b t h w 3']], Float[Array, 'b t h w 3']]


@flax.struct.dataclass
class TrainState:
  """All that changes while training.

  Attributes:
    step: optimiser steps done.
    params: the parameters, float32.
    batch_stats: running statistics of the BatchNorm layers.
    opt_state: of the optimiser.
    ema_params: an exponential moving average of the parameters, which is what
      is tested and used; None without one.
  """

  step: Any  # an array, or what stands for one: its shape, its sharding
  params: Any
  batch_stats: Any
  opt_state: Any
  ema_params: Any = None

  def variables(self) -> dict[str, Any]:
    """Returns what the model is to be tested and used with."""
    params = self.params if self.ema_params is None else self.ema_params
    return {'params': params, 'batch_stats': self.batch_stats}


def init_state(
  model: DualFormer,
  optimizer: optax.GradientTransformation,
  seed: int,
  with_ema: bool = False,
) -> TrainState:
  """Returns the state before the first step."""
  variables = model.init(
    jax.random.key(seed), jnp.zeros(model.input_shape(), jnp.float32)
  )
  params = variables['params']
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    batch_stats=variables.get('batch_stats', {}),
    opt_state=optimizer.init(params),
    ema_params=jax.tree.map(jnp.copy, params) if with_ema else None,
  )


def train_step(
  state: TrainState,
  batch: dict[str, Array],
  teacher: Any = None,
  *,
  model: DualFormer,
  optimizer: optax.GradientTransformation,
  augment: Augment,
  mix: Mix | None = None,
  gather: Callable[[Any], Any] = lambda tree: tree,
  token_targets: TokenTargets | None = None,
  token_weight: float = 0.5,
  multi_label: bool = False,
  label_smoothing: float = 0.0,
  ema_decay: float = 0.0,
  frozen: str = '',
  seed: int,
  accumulation_steps: int = 1,
) -> tuple[TrainState, dict[str, Float[Array, '']]]:
  """Returns the state after one optimiser step, and what to log of it.

  Args:
    state: the state before.
    batch: 'clips', uint8 [b, t, h, w, 3], and 'labels', int [b] or, for data
      with several labels, float [b, k]. What begins with 'token_' is for
      `token_targets`, what else there is for `augment`.
    teacher: variables of the model that scores tokens, if one does.
    model: the model. If clips have n times its frames, it takes every nth.
    optimizer: the optimiser.
    augment: makes normalised clips of a key, of uint8 clips, and of the rest of
      the batch by name.
    mix: makes mixed clips and labels of the same key, clips and labels.
    gather: makes parameters ready to be computed with; see
      sharding.gather_for_use.
    token_targets: makes soft labels of tokens of the same key, of `teacher`, of
      normalised clips, and of the batch's part by name; None without.
    token_weight: share of the loss that is the tokens'.
    multi_label: as in losses.cross_entropy.
    label_smoothing: as in losses.cross_entropy.
    ema_decay: by which the average of the parameters is multiplied each step.
    frozen: a regular expression of names such as 'backbone/blocks_0_.*'; what
      it matches as a whole, parameters and statistics, stays as it is.
    seed: of augmentation, dropout and drop path, whose keys depend on it and
      on the step alone.
    accumulation_steps: passes that the batch is split into; BatchNorm sees
      one at a time.
  """
  key = jax.random.fold_in(jax.random.key(seed), state.step)

  def loss_fn(params, batch_stats, batch, key):
    augment_key, dropout_key = jax.random.split(key)
    rest = dict(batch)
    clips, labels = rest.pop('clips'), rest.pop('labels')
    stored = {n: rest.pop(n) for n in list(rest) if n.startswith('token_')}
    clips = augment(augment_key, clips, **rest)
    if mix is not None:
      clips, labels = mix(augment_key, clips, labels)
    output, updates = model.apply(
      {
        'params': _keep_frozen(frozen, gather(params), jax.lax.stop_gradient),
        'batch_stats': batch_stats,
      },
      clips[:, :: clips.shape[1] // model.num_frames],
      train=True,
      rngs={'dropout': dropout_key},
      mutable=['batch_stats'],
    )
    loss = losses.cross_entropy(
      output.logits,
      labels,
      multi_label=multi_label,
      label_smoothing=label_smoothing,
    )
    metrics = {}
    if token_targets is not None:
      targets = token_targets(augment_key, gather(teacher), clips, **stored)
      token_loss = losses.soft_cross_entropy(output.token_logits, targets)
      metrics = {'class_loss': loss, 'token_loss': token_loss}
      loss = (1 - token_weight) * loss + token_weight * token_loss
    new_stats = _keep_frozen(
      frozen,
      updates.get('batch_stats', {}),
      lambda _, old: old,
      batch_stats,
    )
    return loss, (new_stats, {'loss': loss, **metrics})

  def add_pass(carry, part):
    grads, batch_stats = carry
    batch, key = part
    new, (batch_stats, metrics) = jax.grad(loss_fn, has_aux=True)(
      state.params, batch_stats, batch, key
    )
    return (jax.tree.map(jnp.add, grads, new), batch_stats), metrics

  if accumulation_steps == 1:
    grads, (batch_stats, metrics) = jax.grad(loss_fn, has_aux=True)(
      state.params, state.batch_stats, batch, key
    )
  else:
    # Pass i takes rows i, i + n, i + 2n ...: each device keeps its own rows.
    parts = jax.tree.map(
      lambda x: jnp.moveaxis(
        x.reshape(-1, accumulation_steps, *x.shape[1:]), 1, 0
      ),
      batch,
    )
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    (grads, batch_stats), metrics = jax.lax.scan(
      add_pass,
      (zeros, state.batch_stats),
      (parts, jax.random.split(key, accumulation_steps)),
    )
    metrics = jax.tree.map(jnp.mean, metrics)
    grads = jax.tree.map(lambda g: g / accumulation_steps, grads)

  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  ema_params = state.ema_params
  if ema_params is not None:
    # Written so that what does not change stays the same to the last bit.
    ema_params = jax.tree.map(
      lambda old, new: old + (1 - ema_decay) * (new - old), ema_params, params
    )
  new_state = TrainState(
    step=state.step + 1,
    params=params,
    batch_stats=batch_stats,
    opt_state=opt_state,
    ema_params=ema_params,
  )
  # Behind a barrier: otherwise the squares that Adam takes are taken for those
  # of the norm, and kept for both.
  norm = optax.tree.norm(jax.lax.optimization_barrier(grads))
  return new_state, {**metrics, 'gradient_norm': norm}


def _keep_frozen(
  pattern: str, tree: Any, keep: Callable[..., Any], *others: Any
) -> Any:
  """Applies `keep` to the leaves whose name the pattern matches as a whole."""
  if not pattern:
    return tree

  def apply(path, leaf, *rest):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    return keep(leaf, *rest) if re.fullmatch(pattern, name) else leaf

  return jax.tree_util.tree_map_with_path(apply, tree, *others)


def eval_step(
  variables: Any,
  views: UInt8[Array, 'b v t h w 3'],
  *,
  model: DualFormer,
  normalize: Normalize,
  multi_label: bool = False,
) -> Float[Array, 'b k']:
  """Returns the class probabilities of each video, averaged over its views.

  Args:
    variables: parameters and BatchNorm statistics.
    views: the views of each video.
    model: the model.
    normalize: makes normalised clips of uint8 ones.
    multi_label: whether each class has a probability of its own (sigmoid)
      rather than its share of one (softmax).
  """
  activation = jax.nn.sigmoid if multi_label else jax.nn.softmax
  logits = view_logits(variables, views, model=model, normalize=normalize)
  return jnp.mean(activation(logits), axis=1)


def view_logits(
  variables: Any,
  views: UInt8[Array, 'b v t h w 3'],
  *,
  model: DualFormer,
  normalize: Normalize,
  gather: Callable[[Any], Any] = lambda tree: tree,
) -> Float[Array, 'b v k']:
  """Returns the class scores of each view of each video.

  Takes the arguments of eval_step, and `gather` of train_step.
  """
  variables = gather(variables)

  def score(clips):
    output: Any = model.apply(variables, normalize(clips))
    return output.logits

  # As many views at a time as keep a device busy, and no more memory than a
  # batch of clips takes; a CPU is busy with one.
  batch, count = views.shape[:2]
  most = 1
  if platform() != 'cpu':
    devices = max(1, jax.sharding.get_abstract_mesh().size)
    most = max(1, _CLIPS_AT_A_TIME * devices // batch)
  together = max(n for n in range(1, count + 1) if count % n == 0 and n <= most)
  passes = rearrange(views, 'b (i v) t h w c -> i (b v) t h w c', v=together)
  logits = jax.lax.map(score, passes)
  return rearrange(logits, 'i (b v) k -> b (i v) k', v=together)
