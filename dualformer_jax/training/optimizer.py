"""AdamW with the recipe's learning rates: over time and per parameter."""

from collections.abc import Callable, Sequence
import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dualformer_jax import errors

# Warm-up starts from this share of the epoch's learning rate.
WARMUP_START = 0.1

# (regular expression, learning rate multiplier, decay multiplier): what it
# should be, which is checked, because rules come from configs and flags.
Rule = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Multipliers:
  """What one parameter's learning rate and weight decay are multiplied by."""

  learning_rate: float
  decay: float


def learning_rate_schedule(
  base_lr: float, num_epochs: int, warmup_epochs: float, steps_per_epoch: int
) -> Callable[[jax.typing.ArrayLike], jax.Array]:
  """Returns the learning rate of each step: a cosine with a linear warm-up.

  The cosine falls from base_lr to 0 and moves once an epoch: the rate is
  base_lr (1 + cos(pi epoch / num_epochs)) / 2 in all of an epoch. Before step
  w = warmup_epochs steps_per_epoch it is multiplied by 0.1 + 0.9 step / w.
  Where w is no whole number, the rest of that epoch stays at the rate of the
  last step before w, as in the published implementation.

  Args:
    base_lr: the highest learning rate.
    num_epochs: the length of the training, where the rate would be 0.
    warmup_epochs: the length of the warm-up, not necessarily whole.
    steps_per_epoch: optimiser steps in an epoch.

  Returns:
    A function of the step, an integer from 0; float32, and exact to its last
    digits for any step, because nothing large is rounded: the epochs' rates
    are a table, worked out in float64.
  """
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


def parameter_multipliers(params: Any, rules: Sequence[Rule]) -> Any:
  """Returns a tree like `params` that holds the Multipliers of each parameter.

  Args:
    params: a tree of arrays or of their shapes.
    rules: (regular expression, learning rate multiplier, decay multiplier),
      in order: a parameter takes the first rule whose expression matches all
      of its name, such as 'backbone/pos_block_0/proj_0/kernel'.

  Raises:
    errors.UserError: no rule matches a parameter, a rule is the first to match
      of none, or an expression is malformed.
  """
  patterns = [_compile(rule) for rule in rules]
  used = set()

  def find(path, _) -> Multipliers:
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    for index, (pattern, rule) in enumerate(zip(patterns, rules, strict=True)):
      if pattern.fullmatch(name):
        used.add(index)
        return Multipliers(*rule[1:])
    raise errors.UserError(
      f"optimizer.multipliers: no rule matches the parameter '{name}'; end "
      "with the rule ('.*', 1.0, 1.0)"
    )

  result = jax.tree_util.tree_map_with_path(find, params)
  for index, rule in enumerate(rules):
    if index not in used:
      raise errors.UserError(
        f"optimizer.multipliers: the rule '{rule[0]}' is the first to match "
        'of no parameter; correct it, move it up, or take it out'
      )
  return result


def layer_numbers(params: Any) -> Any:
  """Returns a tree like `params`: how many layers from the head each one is.

  The head and the last norm are at 0, the last block at 1, the first block at
  the number of blocks; what embeds patches goes with the block after it, the
  positional convolution with the block before it (as layers are counted in
  BEiT, arXiv 2106.08254).
  """
  blocks: list[tuple[int, int]] = sorted(
    (int(match[1]), int(match[2]))
    for name in params['backbone']
    if (match := re.fullmatch(r'blocks_(\d+)_(\d+)', name))
  )

  def number(path, _) -> int:
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    if match := re.match(r'backbone/blocks_(\d+)_(\d+)/', name):
      place = int(match[1]), int(match[2])
    elif match := re.match(r'backbone/(?:patch_embeds|pos_block)_(\d+)/', name):
      place = int(match[1]), 0
    else:
      return 0
    return len(blocks) - blocks.index(place)

  return jax.tree_util.tree_map_with_path(number, params)


def make_optimizer(
  params: Any,
  learning_rate: optax.ScalarOrSchedule,
  weight_decay: float,
  multipliers: Sequence[Rule],
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  *,
  max_grad_norm: float = 0.0,
  layer_decay: float = 1.0,
  frozen: str = '',
) -> optax.GradientTransformation:
  """Returns AdamW with decoupled decay and a rate and decay per parameter.

  It computes what torch.optim.AdamW with parameter groups does:
  p -= rate (adam(gradient) + decay p), where rate = learning_rate x the
  parameter's multiplier, and decay = weight_decay x its other multiplier
  (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2).

  Args:
    params: the parameters, or a tree of their shapes.
    learning_rate: a number, or a function of the step.
    weight_decay: the decay before multiplication.
    multipliers: the rules of parameter_multipliers.
    b1: how slowly the mean of the gradients changes.
    b2: how slowly the mean of their squares changes.
    eps: keeps the division finite.
    max_grad_norm: gradients whose norm, over all parameters, is larger are
      scaled down to it; 0 for never.
    layer_decay: what the rate is multiplied by for each layer that a parameter
      is away from the head; see layer_numbers.
    frozen: a regular expression; parameters whose names it matches as a whole
      are not changed.

  Raises:
    errors.UserError: as in parameter_multipliers; or `frozen` is malformed or
      matches nothing, or a number is out of range.
  """
  if max_grad_norm < 0 or not 0 < layer_decay <= 1:
    raise errors.UserError(
      f'optimizer.max_grad_norm is {max_grad_norm} and layer_decay'
      f' {layer_decay}; expected 0 or more, and more than 0 up to 1'
    )
  tree = parameter_multipliers(params, multipliers)
  if layer_decay < 1:
    tree = jax.tree.map(
      lambda m, away: dataclasses.replace(
        m, learning_rate=m.learning_rate * layer_decay**away
      ),
      tree,
      layer_numbers(params),
    )
  if frozen:
    tree = _without_frozen(tree, frozen)

  def decay(updates, params):
    return jax.tree.map(
      lambda update, param, m: update + weight_decay * m.decay * param,
      updates,
      params,
      tree,
    )

  def scale(updates, params):
    del params
    return jax.tree.map(
      lambda update, m: m.learning_rate * update, updates, tree
    )

  clip = [optax.clip_by_global_norm(max_grad_norm)] if max_grad_norm else []
  return optax.chain(
    *clip,
    optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
    optax.stateless(decay),
    optax.stateless(scale),
    optax.scale_by_learning_rate(learning_rate),
  )


def _without_frozen(tree: Any, frozen: str) -> Any:
  """Sets the multipliers of the parameters that `frozen` matches to 0."""
  try:
    pattern = re.compile(frozen)
  except re.error as error:
    raise errors.UserError(
      f"optimizer.frozen: the regular expression '{frozen}' is malformed:"
      f' {error}'
    ) from error
  names = []

  def stop(path, multipliers: Multipliers) -> Multipliers:
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    if not pattern.fullmatch(name):
      return multipliers
    names.append(name)
    return Multipliers(0.0, 0.0)

  tree = jax.tree_util.tree_map_with_path(stop, tree)
  if not names:
    raise errors.UserError(
      f"optimizer.frozen: '{frozen}' matches no parameter as a whole; names"
      " are such as 'backbone/blocks_0_0/attn/qkv/kernel'"
    )
  return tree


def _compile(rule: Rule) -> re.Pattern[str]:
  match rule:
    case (str(pattern), float() | int(), float() | int()):
      try:
        return re.compile(pattern)
      except re.error as error:
        raise errors.UserError(
          f"optimizer.multipliers: the regular expression '{pattern}' is "
          f'malformed: {error}'
        ) from error
  raise errors.UserError(
    f'optimizer.multipliers: {rule!r} should be (regular expression, '
    'learning rate multiplier, decay multiplier)'
  )
