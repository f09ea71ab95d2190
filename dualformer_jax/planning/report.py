"""Reports a plan: needs of a step, lower bounds of its time, and its flags."""

from typing import Any

from dualformer_jax.planning import compile as compiling
from dualformer_jax.planning.chips import Target
from dualformer_jax.planning.compile import Plan
from dualformer_jax.training import setup

# Training videos as published; see README.md, "Prepare a dataset".
PUBLISHED_VIDEOS = {
  'activitynet': 10_024,
  'diving48': 15_027,
  'hmdb51': 3_570,
  'hvu': 481_000,
  'jester': 118_562,
  'kinetics400': 246_534,
  'kinetics600': 383_393,
  'kinetics700': 542_357,
  'moments_in_time': 802_264,
  'multi_moments_in_time': 1_000_000,
  'omnisource': 76_030,
  'something_something_v1': 86_017,
  'something_something_v2': 168_913,
  'ucf101': 9_537,
}


def make_report(
  config: setup.Config,
  target: Target,
  plan: Plan,
  num_videos: int,
  videos_source: str,
) -> dict[str, Any]:
  """Returns the figures of a plan, for JSON.

  If the step does not fit, the report ends after its memory.
  """
  clips = config.batch_size / (plan.settings.data * plan.settings.fsdp)
  report: dict[str, Any] = {
    'chip': target.chip.name,
    'devices': len(target.devices),
    'batch_size': config.batch_size,
    'clips_per_device': clips,
    'flags': plan.settings.flags(),
    'memory': {
      'needed': plan.memory,
      'parameters_and_optimizer': plan.state_bytes,
      'has': target.chip.memory,
      'fits': plan.fits(target),
    },
    'compile_seconds': plan.compile_seconds,
  }
  work = plan.work
  if work is None:
    return report
  groups: dict[tuple[str, str, str], dict[str, float]] = {}
  unexpected = []
  for collective, purpose in zip(work.collectives, plan.purposes, strict=True):
    key = purpose, collective.kind, ' x '.join(collective.axes)
    sums = groups.setdefault(key, {'times': 0, 'bytes': 0, 'sent': 0})
    sums['times'] += collective.count
    sums['bytes'] += collective.count * collective.bytes
    sums['sent'] += collective.bytes_sent()
    if purpose == compiling.UNEXPECTED:
      unexpected.append(
        {
          'kind': collective.kind,
          'axes': collective.axes,
          'times': collective.count,
          'bytes': collective.bytes,
          'name': collective.name,
        }
      )
  seconds = plan.seconds(target)
  clips_per_epoch = config.dataset.repeats * num_videos
  steps = config.num_epochs * max(1, clips_per_epoch // config.batch_size)
  return report | {
    'flops': work.flops,
    'analytic_flops': plan.model_flops,
    'bytes': work.bytes_accessed,
    'breakdown': [
      {'operation': operation, 'bytes': accessed, 'instructions': count}
      for operation, (accessed, count) in sorted(
        work.traffic.items(), key=lambda item: -item[1][0]
      )
    ],
    'unknown_loops': work.unknown_loops,
    'collectives': [
      {'purpose': purpose, 'kind': kind, 'axes': axes, **sums}
      for (purpose, kind, axes), sums in sorted(groups.items())
    ],
    'unexpected': unexpected,
    'seconds': seconds,
    'videos': num_videos,
    'videos_source': videos_source,
    'steps': steps,
    'hours': steps * max(seconds.values()) / 3600,
  }


def format_report(report: dict[str, Any], breakdown: int = 0) -> str:
  """Returns a report as text, with `breakdown` rows of memory traffic."""
  memory = report['memory']
  lines = [
    f'{report["devices"]} x {report["chip"]}, batch of {report["batch_size"]}: '
    f'{report["clips_per_device"]:g} clips per device',
    f'memory        {memory["needed"] / 1e9:.2f} of {memory["has"] / 1e9:.2f} '
    'GB per device, of which parameters and optimizer '
    f'{memory["parameters_and_optimizer"] / 1e9:.2f} GB: '
    f'{"fits" if memory["fits"] else "DOES NOT FIT"}',
  ]
  flags = f'flags         {report["flags"]}'
  if 'flops' not in report:
    return '\n'.join([*lines, flags])
  ratio = report['flops'] / report['analytic_flops']
  lines += [
    f'arithmetic    {report["flops"] / 1e12:.3f} TFLOP per device, '
    f'{ratio:.1%} of the model',
    f'traffic       {report["bytes"] / 1e9:.2f} GB per device',
  ]
  for row in report['breakdown'][:breakdown]:
    lines.append(
      f'  {row["bytes"] / 1e9:8.3f} GB  {row["instructions"]:5} instructions  '
      f'{row["operation"]}'
    )
  for c in report['collectives']:
    lines.append(
      f'{c["kind"] + " ":14}{c["purpose"]}, along {c["axes"]}: {c["times"]} '
      f'times, {c["bytes"] / 1e6:.1f} MB ({c["sent"] / 1e6:.1f} MB sent)'
    )
  for c in report['unexpected']:
    lines.append(
      f'  UNEXPECTED: {c["times"]} x {c["bytes"] / 1e6:.1f} MB for {c["name"]}'
    )
  if not report['unexpected']:
    lines.append('              no activations are gathered')
  if report['unknown_loops']:
    lines.append(
      f'              {report["unknown_loops"]} loops of unknown length are '
      'counted as one iteration'
    )
  bounds = (f'{1e3 * s:.1f} ms by {n}' for n, s in report['seconds'].items())
  lines += [
    f'step          at least {", ".join(bounds)}',
    f'training      {report["steps"]:,} steps on {report["videos"]:,} videos '
    f'({report["videos_source"]}), at least {report["hours"]:.1f} hours',
  ]
  return '\n'.join([*lines, flags])
