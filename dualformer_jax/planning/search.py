"""Searches mesh, accumulation and remat for the fastest settings that fit."""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import itertools
import logging

import jax
import numpy as np

from dualformer_jax import progress
from dualformer_jax.distributed import sharding
from dualformer_jax.errors import UserError
from dualformer_jax.models.dualformer import REMAT_MODES
from dualformer_jax.planning import costs
from dualformer_jax.planning.chips import Target
from dualformer_jax.planning.compile import Plan, Settings, compile_step
from dualformer_jax.training import setup

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Seconds and bytes per device of a step, estimated before compilation."""

  settings: Settings
  seconds: float
  memory: float


def search(
  config: setup.Config,
  target: Target,
  max_compiles: int,
  effort: float = 0.0,
) -> Plan:
  """Returns the plan of the fastest settings that fit.

  Compiles the fastest settings that fit by their estimate, corrects the
  estimates by the memory of the compiled program, and repeats until no faster
  settings can fit. Raises UserError if none do.
  """
  candidates = list(_candidates(config, len(target.devices)))
  if not candidates:
    raise UserError(
      f'batch_size={config.batch_size} cannot be split over '
      f'{len(target.devices)} devices, with heads {config.model.num_heads} '
      'along mesh.tensor; make it a multiple of the devices (and adapt '
      'optimizer.learning_rate)'
    )
  _LOG.info('estimating %d settings ...', len(candidates))
  with progress.waiting('estimating'):
    remaining = sorted(_estimate_all(config, target, candidates), key=_order)
  limit = target.chip.memory
  correction = 1.0
  best: Plan | None = None
  needed: list[float] = []
  while remaining and len(needed) < max_compiles:
    fitting = [e for e in remaining if correction * e.memory <= limit]
    if not fitting and needed:
      break
    chosen = (fitting or [min(remaining, key=lambda e: e.memory)])[0]
    _LOG.info(
      'compiling %d of at most %d: %s ...',
      len(needed) + 1,
      max_compiles,
      chosen.settings.flags(),
    )
    with progress.waiting(f'compiling {len(needed) + 1}'):
      plan = compile_step(config, chosen.settings, target, effort)
    needed.append(plan.memory)
    correction = plan.memory / chosen.memory
    if plan.fits(target):
      best = plan
      remaining = remaining[: remaining.index(chosen)]  # those that are faster
    else:
      remaining.remove(chosen)
    _LOG.info(
      '%s (compiled in %.0f s); %d settings remain',
      _finding(plan, target),
      plan.compile_seconds,
      len(remaining),
    )
  if best is None:
    raise UserError(
      f'no settings were found that fit into {limit / 1e9:.1f} GB per device; '
      f'the smallest need {min(needed) / 1e9:.1f} GB: use more devices, or a '
      'smaller batch_size'
    )
  return best


def _finding(plan: Plan, target: Target) -> str:
  """Returns what a compilation found, in one line."""
  gigabytes = (
    f'{plan.memory / 1e9:.1f} of {target.chip.memory / 1e9:.1f} GB per device'
  )
  if not plan.fits(target):
    return f'does not fit: {gigabytes}'
  seconds = plan.seconds(target)
  cause = max(seconds, key=lambda name: seconds[name])
  return (
    f'fits: {gigabytes}, a step takes at least {1e3 * seconds[cause]:.1f} ms '
    f'by {cause}'
  )


def _order(estimate: Estimate) -> tuple[float, ...]:
  settings = estimate.settings
  return (
    estimate.seconds,
    REMAT_MODES.index(settings.remat),
    settings.accumulation_steps,
    settings.fsdp,
  )


def _candidates(config: setup.Config, num_devices: int) -> Iterator[Settings]:
  """Yields all settings that split heads, batch and devices evenly."""
  for tensor, remat in itertools.product(_divisors(num_devices), REMAT_MODES):
    replicas = num_devices // tensor
    if config.batch_size % replicas or any(
      heads % tensor for heads in config.model.num_heads
    ):
      continue
    for fsdp in _divisors(replicas):
      for steps in _divisors(config.batch_size // replicas):
        yield Settings(replicas // fsdp, fsdp, tensor, steps, remat)


def _divisors(number: int) -> list[int]:
  return [d for d in range(1, number + 1) if number % d == 0]


def _estimate_all(
  config: setup.Config, target: Target, candidates: Sequence[Settings]
) -> list[Estimate]:
  """Returns an estimate of each candidate."""
  on_one_device = Settings(1, 1, 1, 1, config.model.remat).apply(config)
  training = setup.make_training(on_one_device, devices=target.devices[:1])
  model, state = training.model, training.abstract_state
  param_bytes = sum(4 * leaf.size for leaf in jax.tree.leaves(state.params))
  block_outputs = costs.block_outputs(model)
  saved_bytes, flops = {}, {}
  for remat in REMAT_MODES:
    saved_bytes[remat] = costs.saved_activation_bytes(model.clone(remat=remat))
    flops[remat] = costs.training_flops(model.clone(remat=remat))

  @functools.cache
  def sharded_bytes(fsdp: int, tensor: int) -> tuple[int, int]:
    """Returns the bytes of the state, and of its parameters, per device."""
    devices = np.reshape(target.devices, (-1, fsdp, tensor))
    mesh = jax.sharding.Mesh(devices, sharding.AXES)
    sharded = setup.with_shardings(state, mesh)
    state_bytes = costs.bytes_per_device(sharded)
    return state_bytes, costs.bytes_per_device(sharded.params)

  def estimate(s: Settings) -> Estimate:
    clips = config.batch_size / (s.data * s.fsdp)  # per device
    state_bytes, gradient_bytes = sharded_bytes(s.fsdp, s.tensor)
    if s.accumulation_steps > 1:  # and their sum
      gradient_bytes *= 2
    memory = (
      state_bytes
      + gradient_bytes
      + clips / s.accumulation_steps * saved_bytes[s.remat]
    )
    sent = 0.0  # per micro-batch: gradients, in float32
    if s.data > 1:
      sent += 2 * param_bytes / s.tensor / s.fsdp
    if s.fsdp > 1:  # and parameters, in bfloat16, forward and backward
      sent += 2 * param_bytes / s.tensor
    sent *= s.accumulation_steps
    if s.tensor > 1:  # two sums per block, forward and backward, in bfloat16
      sent += 2 * 4 * block_outputs * clips * 2
    arithmetic = config.batch_size / len(target.devices) * flops[s.remat]
    seconds = arithmetic / target.chip.flops + sent / target.link
    return Estimate(s, seconds, memory)

  return [estimate(settings) for settings in candidates]
