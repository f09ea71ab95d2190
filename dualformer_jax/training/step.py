"""One step of training, and one of evaluation, as pure functions."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8
import optax

from dualformer_jax.models.dualformer import DualFormer
from dualformer_jax.training import losses

Augment = Callable[..., Float[Array, 'b t h w 3']]
Labels = Int[Array, 'b'] | Float[Array, 'b k']
Mix = Callable[
  [PRNGKeyArray, Float[Array, 'b t h w 3'], Labels],
  tuple[Float[Array, 'b t h w 3'], Labels],
]
Normalize = Callable[[UInt8[Array, 'b t h w 3']], Float[Array, 'b t h w 3']]


@flax.struct.dataclass
class TrainState:
  """All that changes while training.

  Attributes:
    step: optimiser steps done.
    params: the parameters, float32.
    batch_stats: running statistics of the BatchNorm layers.
    opt_state: of the optimiser.
  """

  step: Any  # an array, or what stands for one: its shape, its sharding
  params: Any
  batch_stats: Any
  opt_state: Any


def init_state(
  model: DualFormer, optimizer: optax.GradientTransformation, seed: int
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
  )


def train_step(
  state: TrainState,
  batch: dict[str, Array],
  *,
  model: DualFormer,
  optimizer: optax.GradientTransformation,
  augment: Augment,
  mix: Mix | None = None,
  multi_label: bool = False,
  seed: int,
  accumulation_steps: int = 1,
) -> tuple[TrainState, dict[str, Float[Array, '']]]:
  """Returns the state after one optimiser step, and what to log of it.

  Args:
    state: the state before.
    batch: 'clips', uint8 [b, t, h, w, 3], and 'labels', int [b] or, for data
      with several labels, float [b, k]; what else there is, is for `augment`.
    model: the model.
    optimizer: the optimiser.
    augment: makes normalised clips of a key, of uint8 clips, and of the rest of
      the batch by name.
    mix: makes mixed clips and labels of the same key, clips and labels.
    multi_label: as in losses.cross_entropy.
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
    clips = augment(augment_key, clips, **rest)
    if mix is not None:
      clips, labels = mix(augment_key, clips, labels)
    output, updates = model.apply(
      {'params': params, 'batch_stats': batch_stats},
      clips,
      train=True,
      rngs={'dropout': dropout_key},
      mutable=['batch_stats'],
    )
    loss = losses.cross_entropy(output.logits, labels, multi_label=multi_label)
    return loss, updates.get('batch_stats', {})

  def add_pass(carry, part):
    grads, batch_stats = carry
    batch, key = part
    (loss, batch_stats), new = jax.value_and_grad(loss_fn, has_aux=True)(
      state.params, batch_stats, batch, key
    )
    return (jax.tree.map(jnp.add, grads, new), batch_stats), loss

  if accumulation_steps == 1:
    (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(
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
    (grads, batch_stats), pass_losses = jax.lax.scan(
      add_pass,
      (zeros, state.batch_stats),
      (parts, jax.random.split(key, accumulation_steps)),
    )
    loss = jnp.mean(pass_losses)
    grads = jax.tree.map(lambda g: g / accumulation_steps, grads)

  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  new_state = TrainState(
    step=state.step + 1,
    params=optax.apply_updates(state.params, updates),
    batch_stats=batch_stats,
    opt_state=opt_state,
  )
  metrics = {'loss': loss, 'gradient_norm': optax.tree.norm(grads)}
  return new_state, metrics


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
) -> Float[Array, 'b v k']:
  """Returns the class scores of each view of each video.

  Takes the arguments of eval_step.
  """

  def score(clips):
    output: Any = model.apply(variables, normalize(clips))
    return output.logits

  # One view at a time: as much memory as for a batch of clips.
  logits = jax.lax.map(score, jnp.moveaxis(views, 1, 0))
  return jnp.moveaxis(logits, 0, 1)
