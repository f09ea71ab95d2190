"""AdamW, with the learning rate schedule and multipliers of the recipes."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np
import optax

from dualformer_jax.errors import UserError
from dualformer_jax.kernels.dispatch import (
  Compute,
  hopper_kernels,
  no_kernel,
  parameters_are_replicated,
  run_replicated,
)

# The warm-up starts at this fraction of the learning rate.
WARMUP_START = 0.1

# (regular expression, learning rate multiplier, decay multiplier). Rules come
# from configs and flags, so their types are checked at run time.
Rule = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Multipliers:
  """Multipliers of the learning rate and the weight decay of a parameter."""

  learning_rate: float
  decay: float


def learning_rate_schedule(
  base_lr: float, num_epochs: int, warmup_epochs: float, steps_per_epoch: int
) -> Callable[[jax.typing.ArrayLike], jax.Array]:
  """Returns a cosine schedule with a linear warm-up, a function of the step.

  The learning rate is base_lr (1 + cos(pi epoch / num_epochs)) / 2, constant
  within an epoch. For the first w = warmup_epochs * steps_per_epoch steps it is
  multiplied by 0.1 + 0.9 step / w. If w is not an integer, the rest of its
  epoch keeps the multiplier of the last step before w, as in the published
  implementation.
  """
  # A table in float64: float32 cosines of long runs lose digits.
  epochs = np.arange(num_epochs + 1)
  rates = base_lr * (1 + np.cos(np.pi * epochs / num_epochs)) / 2
  warmup_steps = warmup_epochs * steps_per_epoch
  last_warmup_step = math.floor(warmup_steps)
  last_warmup_epoch = last_warmup_step // steps_per_epoch

  def schedule(step: jax.typing.ArrayLike) -> jax.Array:
    step = jnp.asarray(step)
    epoch = jnp.minimum(step // steps_per_epoch, num_epochs)
    rate = jnp.asarray(rates, jnp.float32)[epoch]
    if not warmup_steps:
      return rate
    done = jnp.minimum(step, last_warmup_step) / warmup_steps
    factor = WARMUP_START + (1 - WARMUP_START) * done
    return jnp.where(epoch > last_warmup_epoch, rate, rate * factor)

  return schedule


@dataclasses.dataclass(frozen=True)
class AdamW:
  """AdamW with a learning rate and a weight decay for each parameter.

  The update is p -= lr * (adam(gradient) + decay * p), as torch.optim.AdamW
  does with parameter groups (Loshchilov and Hutter, arXiv 1711.05101,
  algorithm 2). `multipliers` is a tree of Multipliers.
  """

  multipliers: Any
  learning_rate: optax.ScalarOrSchedule
  weight_decay: float
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  max_grad_norm: float = 0.0
  compute: Compute = Compute()

  @functools.cached_property
  def transformation(self) -> optax.GradientTransformation:
    """The optimizer as a transformation of gradients to updates."""

    def decay(updates, params):
      return jax.tree.map(
        lambda m, u, p: u + self.weight_decay * m.decay * p,
        self.multipliers,
        updates,
        params,
      )

    def scale(updates, _):
      return jax.tree.map(
        lambda m, u: m.learning_rate * u, self.multipliers, updates
      )

    norm = self.max_grad_norm
    return optax.chain(
      *([optax.clip_by_global_norm(norm)] if norm else []),
      optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps),
      optax.stateless(decay),
      optax.stateless(scale),
      optax.scale_by_learning_rate(self.learning_rate),
    )

  def apply_gradients(
    self, grads: Any, opt_state: Any, params: Any
  ) -> tuple[Any, Any, Float[Array, '']]:
    """Returns parameters and state after a step, and the norm of gradients."""
    kernels = self.compute.choose(no_kernel, gpu=hopper_kernels)(
      'adam_gpu', self.compute
    )
    if kernels and parameters_are_replicated():
      return self._apply_fused(kernels, grads, opt_state, params)
    return apply_gradients(self.transformation, grads, opt_state, params)

  def _apply_fused(self, kernels, grads, opt_state, params):
    """The same in few launches, on the state of `transformation`."""
    *clip, adam, decay, scale, schedule = opt_state
    trees = grads, params, adam.mu, adam.nu
    gradients, *states = map(jax.tree.leaves, trees)
    norm = run_replicated(kernels.norm, gradients)
    factor = 1.0
    if self.max_grad_norm:
      factor = jnp.minimum(1.0, self.max_grad_norm / norm)
    rate = self.learning_rate
    if callable(rate):
      rate = rate(schedule.count)
      schedule = schedule._replace(count=optax.safe_increment(schedule.count))
    count = optax.safe_increment(adam.count)
    corrections = 1 / (1 - self.b1**count), 1 / (1 - self.b2**count)
    scalars = jnp.stack([rate, factor, *corrections]).astype(jnp.float32)
    update = functools.partial(
      kernels.update,
      rates=[
        kernels.Rates(
          learning_rate=multipliers.learning_rate,
          decay=multipliers.decay * self.weight_decay,
          b1=self.b1,
          b2=self.b2,
          eps=self.eps,
        )
        for multipliers in jax.tree.leaves(self.multipliers)
      ],
    )
    arrays = list(zip(gradients, *states, strict=True))
    new = run_replicated(update, arrays, scalars)
    params, mu, nu = (
      jax.tree.unflatten(jax.tree.structure(grads), leaves)
      for leaves in zip(*new, strict=True)
    )
    adam = adam._replace(count=count, mu=mu, nu=nu)
    return params, (*clip, adam, decay, scale, schedule), norm


def make_optimizer(
  params: Any,
  learning_rate: optax.ScalarOrSchedule,
  weight_decay: float,
  multipliers: Sequence[Rule],
  *,
  layer_decay: float = 1.0,
  frozen: str = '',
  **options: Any,
) -> AdamW:
  """Returns AdamW with the multipliers of rules; see `parameter_multipliers`.

  Options are those of `config.optimizer` and `compute`; `params` can be shapes.
  """
  tree = parameter_multipliers(params, multipliers, layer_decay, frozen)
  return AdamW(tree, learning_rate, weight_decay, **options)


def apply_gradients(
  optimizer: optax.GradientTransformation,
  grads: Any,
  opt_state: Any,
  params: Any,
) -> tuple[Any, Any, Float[Array, '']]:
  """Returns parameters and state after a step, and the norm of gradients."""
  updates, opt_state = optimizer.update(grads, opt_state, params)
  params = optax.apply_updates(params, updates)
  # The barrier keeps XLA from sharing the squared gradients between Adam and
  # the norm, which would hold all of them in memory.
  norm = optax.tree.norm(jax.lax.optimization_barrier(grads))
  return params, opt_state, norm


def parameter_multipliers(
  params: Any, rules: Sequence[Rule], layer_decay: float = 1.0, frozen: str = ''
) -> Any:
  """Returns the Multipliers of each parameter.

  The first rule that matches the full name of a parameter, such as
  'backbone/pos_block_0/proj_0/kernel', applies. The learning rate is multiplied
  by `layer_decay` for each layer between the parameter and the head. Parameters
  that match `frozen` have multipliers of 0.
  """
  compiled = []
  for rule in (*rules, (frozen, 0.0, 0.0)):
    try:
      pattern, learning_rate, decay = rule
      compiled.append((re.compile(pattern), learning_rate + 0.0, decay + 0.0))
    except (TypeError, ValueError, re.error) as error:
      raise UserError(
        f'optimizer.multipliers or frozen: {rule!r} should be (regular '
        f'expression, learning rate multiplier, decay multiplier): {error}'
      ) from error
  frozen_pattern, *_ = compiled.pop()
  unused, frozen_names = set(range(len(rules))), []
  layers_to_head = _layers_to_head(params) if layer_decay < 1 else None

  def find(path, _) -> Multipliers:
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    for index, (pattern, learning_rate, decay) in enumerate(compiled):
      if not pattern.fullmatch(name):
        continue
      unused.discard(index)
      if frozen_pattern.fullmatch(name):
        frozen_names.append(name)
        return Multipliers(0.0, 0.0)
      if layers_to_head is not None:
        learning_rate *= layer_decay ** layers_to_head(name)
      return Multipliers(learning_rate, decay)
    raise UserError(
      f"optimizer.multipliers: no rule matches the parameter '{name}'; end "
      "with the rule ('.*', 1.0, 1.0)"
    )

  result = jax.tree_util.tree_map_with_path(find, params)
  if unused:
    raise UserError(
      f"optimizer.multipliers: the rule '{rules[min(unused)][0]}' is the first "
      'to match no parameter; correct it, move it up, or remove it'
    )
  if frozen and not frozen_names:
    raise UserError(
      f"optimizer.frozen: '{frozen}' does not match the full name of any "
      "parameter, such as 'backbone/blocks_0_0/attn/qkv/kernel'"
    )
  return result


def _layers_to_head(params: Any) -> Callable[[str], int]:
  """Returns a function from a parameter's name to its layers below the head.

  It is 0 for the head and the last norm, 1 for the last block, and the number
  of blocks for the first one. A patch embedding counts with the block after it,
  a positional convolution with the block before it, as in BEiT (arXiv
  2106.08254).
  """
  matches = (re.fullmatch(r'blocks_(\d+)_(\d+)', n) for n in params['backbone'])
  blocks = sorted((int(m[1]), int(m[2])) for m in matches if m)
  layer = re.compile(
    r'backbone/(?:blocks|patch_embeds|pos_block)_(\d+)_?(\d*)/'
  )

  def count(name: str) -> int:
    match = layer.match(name)
    if match is None:
      return 0
    return len(blocks) - blocks.index((int(match[1]), int(match[2] or 0)))

  return count
