"""One training step, as a pure function."""

from collections.abc import Callable
import dataclasses
import re
from typing import Any

from einops import rearrange
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dualformer_jax.models.dualformer import DualFormer
from dualformer_jax.training import losses
from dualformer_jax.training.state import TrainState

# (key, uint8 clips, labels, **other arrays) -> normalized clips, labels
Augment = Callable[..., tuple[Array, Array]]
# (key, teacher variables, normalized clips, **stored labels) -> soft labels
TokenTargets = Callable[..., Float[Array, 'b d h w k']]
# (gradients, optimizer state, parameters) -> parameters, optimizer state, norm
ApplyGradients = Callable[[Any, Any, Any], tuple[Any, Any, Float[Array, '']]]


@dataclasses.dataclass(frozen=True)
class StepOptions:
  """Options of a training step, as in configs/common.py."""

  seed: int  # keys depend on the seed and the step alone
  accumulation_steps: int = 1  # BatchNorm normalizes over one micro-batch
  multi_label: bool = False
  label_smoothing: float = 0.0
  token_loss_weight: float = 0.5
  ema_decay: float = 0.0
  # Regular expression of frozen parameters and BatchNorm statistics.
  frozen: str = ''


def train_step(
  state: TrainState,
  batch: dict[str, Array],
  teacher_variables: Any = None,
  *,
  model: DualFormer,
  apply_gradients: ApplyGradients,
  options: StepOptions,
  augment: Augment,
  token_targets: TokenTargets | None = None,
  all_gather: Callable[[Any], Any] = lambda tree: tree,
) -> tuple[TrainState, dict[str, Float[Array, '']]]:
  """Runs one optimizer step.

  The batch has 'clips', uint8 [b, t, h, w, 3] or YUV [b, t, 3 / 2 * h, w], and
  'labels', int [b] or float [b, k]. Its other arrays are passed by name, to
  `token_targets` if the name starts with 'token_', else to `augment` (see
  augment.augment_batch). If clips have n * model.num_frames frames, as a
  teacher may need, the model gets every nth of them.

  Returns:
    The new state, and scalar metrics: 'loss', 'gradient_norm', 'top1' unless
    clips have several labels and, with `token_targets`, 'class_loss' and
    'token_loss'.
  """
  key = jax.random.fold_in(jax.random.key(options.seed), state.step)
  frozen = options.frozen

  def loss_fn(params, batch_stats, batch, key):
    augment_key, dropout_key = jax.random.split(key)
    stored = {n: batch[n] for n in batch if n.startswith('token_')}
    rest = {n: batch[n] for n in batch if n not in stored}
    clips, labels = augment(augment_key, **rest)
    params = _map_frozen(frozen, jax.lax.stop_gradient, all_gather(params))
    output, updates = model.apply(
      {'params': params, 'batch_stats': batch_stats},
      clips[:, :: clips.shape[1] // model.num_frames],
      train=True,
      rngs={'dropout': dropout_key},
      mutable=['batch_stats'],
    )
    loss = losses.cross_entropy(
      output.logits,
      labels,
      multi_label=options.multi_label,
      label_smoothing=options.label_smoothing,
    )
    metrics = {}
    if not options.multi_label:
      # Of mixed clips, the class with the larger share counts.
      wanted = labels if labels.ndim == 1 else jnp.argmax(labels, axis=-1)
      metrics['top1'] = jnp.mean(jnp.argmax(output.logits, axis=-1) == wanted)
    if token_targets is not None:
      targets = token_targets(
        augment_key, all_gather(teacher_variables), clips, **stored
      )
      token_loss = losses.soft_cross_entropy(output.token_logits, targets)
      metrics |= {'class_loss': loss, 'token_loss': token_loss}
      weight = options.token_loss_weight
      loss = (1 - weight) * loss + weight * token_loss
    new_stats = updates.get('batch_stats', {})
    new_stats = _map_frozen(frozen, lambda _, old: old, new_stats, batch_stats)
    return loss, (new_stats, {'loss': loss, **metrics})

  grad_fn = jax.grad(loss_fn, has_aux=True)
  if options.accumulation_steps > 1:
    grad_fn = _accumulated(grad_fn, options.accumulation_steps)
  grads, (batch_stats, metrics) = grad_fn(
    state.params, state.batch_stats, batch, key
  )
  params, opt_state, norm = apply_gradients(
    grads, state.opt_state, state.params
  )
  ema_params = state.ema_params
  if ema_params is not None:
    # In this form, parameters that do not change keep their exact value.
    share = 1 - options.ema_decay
    ema_params = jax.tree.map(
      lambda old, new: old + share * (new - old), ema_params, params
    )
  new_state = TrainState(
    state.step + 1, params, batch_stats, opt_state, ema_params
  )
  return new_state, {**metrics, 'gradient_norm': norm}


def _accumulated(
  grad_fn: Callable[..., Any], num_microbatches: int
) -> Callable[..., Any]:
  """Returns `grad_fn`, averaged over micro-batches."""

  def averaged_grad(params, batch_stats, batch, key):
    def accumulate(carry, inputs):
      total, batch_stats = carry
      grads, (batch_stats, metrics) = grad_fn(params, batch_stats, *inputs)
      return (jax.tree.map(jnp.add, total, grads), batch_stats), metrics

    # Micro-batch i has rows i, i + n, i + 2n, ...: no row changes its device.
    microbatches = {
      name: rearrange(array, '(b n) ... -> n b ...', n=num_microbatches)
      for name, array in batch.items()
    }
    (total, batch_stats), metrics = jax.lax.scan(
      accumulate,
      (jax.tree.map(jnp.zeros_like, params), batch_stats),
      (microbatches, jax.random.split(key, num_microbatches)),
    )
    grads = jax.tree.map(lambda g: g / num_microbatches, total)
    return grads, (batch_stats, jax.tree.map(jnp.mean, metrics))

  return averaged_grad


def _map_frozen(
  pattern: str, function: Callable[..., Any], tree: Any, *others: Any
) -> Any:
  """Applies `function` to the leaves whose full name matches `pattern`."""
  if not pattern:
    return tree

  def apply(path, leaf, *rest):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    return function(leaf, *rest) if re.fullmatch(pattern, name) else leaf

  return jax.tree_util.tree_map_with_path(apply, tree, *others)
