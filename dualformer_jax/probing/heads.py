"""Trains many heads at once on stored features, one for each setting.

All settings see the same batches and start from the same parameters, so each
head is the same as if it were trained alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import itertools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num
import numpy as np
import optax

from dualformer_jax.evaluation import metrics
from dualformer_jax.models.heads import ClassificationHead
from dualformer_jax.probing.features import Features
from dualformer_jax.progress import counting
from dualformer_jax.training import losses

# (learning rate, weight decay)
Setting = tuple[float, float]
GRIDS: dict[str, tuple[Setting, ...]] = {
  'linear': tuple(
    itertools.product(
      (3e-3, 1e-2, 3e-2), (0.0, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1)
    )
  ),
  'attentive': tuple(
    itertools.product((1e-3, 3e-3, 1e-2, 2e-2), (0.1, 0.3, 1.0, 3.0, 5.0, 10.0))
  ),
}
_BATCH_SIZE = 128  # views
_MIN_STEPS, _MIN_EPOCHS = 400, 20
_WARMUP = 0.05  # share of the steps
_ADAM = optax.scale_by_adam()
# A short average of squared gradients, so that 400 steps reach the optimum.
_LINEAR_ADAM = optax.scale_by_adam(b2=0.95)


@dataclasses.dataclass(frozen=True)
class Inputs:
  """The inputs of a kind of head, from the features of a split.

  Those of a linear head are standardized with `mean` and `std`.
  """

  kind: str
  features: Features
  mean: Float[np.ndarray, ' c']
  std: Float[np.ndarray, ' c']

  def read(
    self, rows: Int[np.ndarray, ' b'], views: Int[np.ndarray, ' b']
  ) -> Float[np.ndarray, 'b ...']:
    """Returns the inputs of views of videos."""
    if self.kind == 'attentive':
      return self.features.tokens(rows, views)
    return (self.features.pooled[rows, views] - self.mean) / self.std


@functools.partial(jax.jit, static_argnames=('head', 'copies'))
def _init_state(key: Any, example: Any, *, head: nn.Module, copies: int) -> Any:
  """Returns parameters and the optimizer's state, each repeated."""
  params = head.init(key, example)['params']
  return jax.tree.map(
    lambda x: jnp.repeat(x[None], copies, axis=0), (params, _ADAM.init(params))
  )


@functools.partial(
  jax.jit, static_argnames=('head', 'multi_label'), donate_argnames='state'
)
def _train_step(
  state: Any,
  settings: Float[Array, 's 2'],
  factor: Float[Array, ''],
  x: Float[Array, 'b ...'],
  y: Num[Array, ' b'] | Num[Array, 'b k'],
  *,
  head: nn.Module,
  multi_label: bool,
) -> Any:
  """Updates the parameters and the optimizer state of all settings.

  Adam minimizes the cross-entropy. Weight decay applies to kernels. For a
  linear head it is part of the objective, decay / 2 times the sum of squares.
  For others it is decoupled, as in AdamW. The learning rates are multiplied by
  `factor`.
  """
  is_linear = isinstance(head, ClassificationHead)

  def loss(params: Any) -> Array:
    scores: Any = head.apply({'params': params}, x)
    return losses.cross_entropy(scores, y, multi_label=multi_label)

  def update(state: Any, setting: Array) -> Any:
    params, moments = state
    rate, decay = setting

    def add_decay(tree: Any) -> Any:
      return jax.tree.map(
        lambda x, p: x + decay * p if p.ndim > 1 else x, tree, params
      )

    gradients = jax.grad(loss)(params)
    if is_linear:
      updates, moments = _LINEAR_ADAM.update(add_decay(gradients), moments)
    else:
      updates, moments = _ADAM.update(gradients, moments)
      updates = add_decay(updates)
    params = jax.tree.map(lambda p, u: p - factor * rate * u, params, updates)
    return params, moments

  return jax.vmap(update)(state, settings)


def fit(
  head: nn.Module,
  inputs: Inputs,
  rows: Int[np.ndarray, ' n'],
  settings: Sequence[Setting],
  *,
  seed: int = 0,
  multi_label: bool = False,
  steps: int = 0,
  batch_size: int = _BATCH_SIZE,
) -> Any:
  """Trains a head on some videos with each setting.

  A batch has one view of each of `batch_size` videos, or all of them if there
  are fewer. The learning rate rises for 5% of the steps, then falls to 0 as a
  cosine.

  Args:
    head: the module.
    inputs: its inputs.
    rows: the videos.
    settings: learning rates and weight decays.
    seed: of the initial parameters and of the order of the videos.
    multi_label: whether a video may have several labels.
    steps: number of steps; by default 400, or 20 epochs if these are more.
    batch_size: videos of a batch.

  Returns:
    Parameters, each with the settings as first axis.
  """
  rng = np.random.default_rng(seed)
  batch_size = min(batch_size, len(rows))
  steps = steps or max(_MIN_STEPS, _MIN_EPOCHS * len(rows) // batch_size)
  num_views = inputs.features.pooled.shape[1]
  example = inputs.read(rows[:1], np.zeros(1, np.int64))
  state = _init_state(
    jax.random.key(seed), jnp.asarray(example), head=head, copies=len(settings)
  )
  table = jnp.asarray(settings, jnp.float32)
  order = _batches(rng, rows, batch_size)
  name = f'Training {inputs.kind} heads, {len(settings)} at once'
  with counting(name, steps, 'steps') as add:
    for step in range(steps):
      batch = next(order)
      views = rng.integers(num_views, size=len(batch))
      warmup = min(1, (step + 1) / (_WARMUP * steps))
      cosine = (1 + math.cos(math.pi * step / steps)) / 2
      state = _train_step(
        state,
        table,
        jnp.float32(warmup * cosine),
        jnp.asarray(inputs.read(batch, views)),
        jnp.asarray(inputs.features.labels[batch]),
        head=head,
        multi_label=multi_label,
      )
      add(1)
    return jax.block_until_ready(state[0])


def _batches(
  rng: np.random.Generator, rows: Int[np.ndarray, ' n'], size: int
) -> Iterator[Int[np.ndarray, ' b']]:
  """Yields batches of shuffled videos, each epoch without the remainder."""
  while True:
    shuffled = rng.permutation(rows)
    for start in range(0, len(rows) - size + 1, size):
      yield shuffled[start : start + size]


@functools.partial(jax.jit, static_argnames='head')
def _apply(params: Any, x: Float[Array, 'b ...'], *, head: nn.Module) -> Any:
  return jax.vmap(lambda p: head.apply({'params': p}, x))(params)


def logits(
  head: nn.Module,
  params: Any,
  inputs: Inputs,
  rows: Int[np.ndarray, ' n'],
) -> Iterator[Float[np.ndarray, 's b v k']]:
  """Yields the logits of all views of videos for each setting, in batches."""
  num_views = inputs.features.pooled.shape[1]
  size = min(_BATCH_SIZE, len(rows))
  for start in range(0, len(rows), size):
    batch = rows[start : start + size]
    padded = np.pad(batch, (0, size - len(batch)), mode='edge')
    scores = [
      _apply(
        params,
        jnp.asarray(inputs.read(padded, np.full(size, view))),
        head=head,
      )
      for view in range(num_views)
    ]
    yield np.stack(scores, axis=2)[:, : len(batch)]


def validate(
  head: nn.Module,
  params: Any,
  inputs: Inputs,
  rows: Int[np.ndarray, ' n'],
  multi_label: bool = False,
) -> Float[np.ndarray, ' s']:
  """Returns the cross-entropy of videos for each setting.

  Probabilities are averaged over the views of a video.
  """
  sums, done = np.zeros(()), 0
  for batch in logits(head, params, inputs, rows):
    labels = inputs.features.labels[rows[done : done + batch.shape[1]]]
    done += len(labels)
    probabilities = [metrics.mean_probabilities(x, multi_label) for x in batch]
    sums = sums + len(labels) * np.array(
      [metrics.cross_entropy(p, labels) for p in probabilities]
    )
  return sums / len(rows)
