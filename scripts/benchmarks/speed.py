"""Measures the speed of the model, compared with PyTorch on the same machine.

  pip install -e '.[benchmark]'
  python scripts/benchmarks/speed.py --out=docs/speed.json

Every program runs in its own process (speed_worker.py), compiled and warmed up
first. Then the programs of a case take turns, round by round, so that other
load on the machine affects all of them. The medians over rounds are compared.
Prints a table, and merges the figures, with machine and versions, into the file
--out. speed_plot.py draws them.

With --stages=1,2,3,4 each stage runs as its own model. The roofline is the
longer of two times: of the matrix products at the measured peak, and of the
memory traffic at the measured bandwidth.

A peer is 'jax', the package; 'jax-full', the package with full space-time
attention; or torch_peer.py as 'eager' or 'compile' (torch.compile). Suffixes of
the latter are '-sdpa', PyTorch's fused attention, and '-kept', a process that
keeps its memory between steps, as 'jax' does on a CPU. In bfloat16, PyTorch
runs under autocast.
"""

from collections.abc import Sequence
import contextlib
import datetime
import itertools
import json
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import time
from typing import Any

from absl import app, flags

WORKER = pathlib.Path(__file__).with_name('speed_worker.py')
PEERS = (
  'jax',
  'eager',
  'eager-sdpa',
  'compile',
  'compile-sdpa',
)

OUT = flags.DEFINE_string('out', None, 'File to write the figures to (JSON).')
VARIANTS = flags.DEFINE_list('variants', 'tiny,small,base', 'Model sizes.')
PASSES = flags.DEFINE_list(
  'passes', 'forward,step', 'forward, step or both: passes to run.'
)
DTYPES = flags.DEFINE_list('dtypes', 'float32,bfloat16', 'Compute dtypes.')
CLIPS = flags.DEFINE_list('clips', '1,2', 'Clips per batch.')
STAGES = flags.DEFINE_list(
  'stages', '0', 'Single stages to run, 1 to 4; 0 is the whole model.'
)
FRAMES = flags.DEFINE_list('frames', '32', 'Frames per clip.')
PIXELS = flags.DEFINE_list('pixels', '224', 'Height and width of a clip.')
PEERS_FLAG = flags.DEFINE_list('peers', ','.join(PEERS), 'Programs to compare.')
TOGETHER = flags.DEFINE_bool(
  'together',
  False,
  'Compile the programs of all cases at once: faster with enough cores and '
  'memory, but the compile times are those of a busy machine.',
)
ROUNDS = flags.DEFINE_integer(
  'rounds', 5, 'Timed runs of each program.', lower_bound=1
)


class Program:
  """A worker process with one program."""

  def __init__(self, case: dict[str, Any]):
    self.case, self.times, self.info = case, [], {}
    self.process = subprocess.Popen(
      [sys.executable, WORKER, json.dumps(case)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )

  def wait(self) -> None:
    """Waits until the program is compiled."""
    self.info = self._answer()

  def _answer(self) -> dict[str, Any]:
    assert self.process.stdout is not None
    line = self.process.stdout.readline()
    return json.loads(line) if line else {'failed': True}

  def run(self) -> None:
    """Times one run."""
    if not self.info.get('failed'):
      assert self.process.stdin is not None
      with contextlib.suppress(BrokenPipeError):
        print('run', file=self.process.stdin, flush=True)
      answer = self._answer()
      self.info |= {k: v for k, v in answer.items() if k == 'failed'}
      self.times += [answer['s']] if 's' in answer else []

  def finish(self) -> dict[str, Any]:
    """Ends the process; returns the case with its figures."""
    assert self.process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
      self.process.stdin.close()
    if not self.info.get('failed'):
      self.info |= self._answer()
    self.process.wait()
    result = {**self.case, **self.info, 'times_s': self.times}
    if self.times:
      median = statistics.median(self.times)
      result |= {'s': median, 'clips_per_s': self.case['clips'] / median}
    return result


def measure(
  case: dict[str, Any], peers: Sequence[str], started: dict[str, Program]
) -> list[dict[str, Any]]:
  """Times all peers in turns; returns their figures.

  Args:
    case: Fields that all peers share.
    peers: Programs to compare.
    started: Programs that are compiling already, by peer.
  """
  programs = []
  for peer in peers:
    start = time.perf_counter()
    program = started.get(peer) or Program({'peer': peer, **case})
    program.wait()
    programs.append(program)
    elapsed = time.perf_counter() - start
    print(f'  {peer}: ready after {elapsed:.0f} s', file=sys.stderr, flush=True)
  for _ in range(ROUNDS.value):
    for program in programs:
      program.run()
  return [program.finish() for program in programs]


def flops(case: dict[str, Any]) -> float:
  """Returns the FLOPs of a case, two per multiply-add.

  The backward pass of a product is two products. Recomputation is not counted.
  """
  import speed_worker

  from dualformer_jax.models import flops
  from dualformer_jax.models.dualformer import DualFormer

  model = DualFormer(**speed_worker.model_fields(case))
  passes = 3 if case['pass'] == 'step' else 1
  products = sum(row.multiply_adds for row in flops.count(model))
  return 2 * passes * case['clips'] * products


def processor() -> str:
  """Returns the name of the processor, if the system knows it."""
  info = pathlib.Path('/proc/cpuinfo')
  text = info.read_text() if info.exists() else ''
  name = re.search(r'model name\s*: (.+)', text)
  return name[1] if name else platform.processor() or platform.machine()


def show(results: Sequence[dict[str, Any]], peaks: dict[str, Any]) -> None:
  """Prints a line for each program of a case."""
  first = results[0]
  stage = f' stage {first["stage"]}' if first['stage'] else ''
  print(
    '{variant}{at} {pass} {dtype}, {clips} x {num_frames} x {image_size} x '
    '{image_size}'.format(**first, at=stage)
  )
  for result in results:
    if 's' not in result:
      print(f'  {result["peer"]:<14} failed')
      continue
    peak = peaks[first['dtype']]
    share = flops(result) / result['s'] / peak['peak_flops']
    ratio = result['s'] / first['s'] if 's' in first else float('nan')
    line = (
      f'  {result["peer"]:<14}{result["clips_per_s"]:8.2f} clips/s '
      f'{ratio:6.2f}x the time '
      f'{result["peak_bytes"] / 1e9:6.2f} GB '
      f'{result["compile_s"]:6.1f} s to compile {share:6.1%} of peak FLOP/s'
    )
    if result.get('bytes_accessed'):
      bandwidth = result['bytes_accessed'] / result['s']
      moved = bandwidth / peak['peak_bandwidth']
      line += f' {moved:6.1%} of bandwidth {max(share, moved):6.1%} of roofline'
    print(line, flush=True)


def main(_: Sequence[str]) -> None:
  """Measures all cases."""
  out = pathlib.Path(OUT.value) if OUT.value else None
  saved = json.loads(out.read_text()) if out and out.exists() else []
  peaks = {}
  for dtype in DTYPES.value:
    program = Program({'peer': 'peaks', 'dtype': dtype})
    program.wait()
    peaks[dtype] = program.finish()
  cases = [
    {
      'variant': variant,
      'stage': int(stage),
      'pass': what,
      'dtype': dtype,
      'clips': int(clips),
      'num_frames': int(frames),
      'image_size': int(pixels),
    }
    for variant, stage, what, dtype, clips, frames, pixels in itertools.product(
      VARIANTS.value,
      STAGES.value,
      PASSES.value,
      DTYPES.value,
      CLIPS.value,
      FRAMES.value,
      PIXELS.value,
    )
  ]
  started: list[dict[str, Program]] = [{} for _ in cases]
  if TOGETHER.value:
    for programs, case in zip(started, cases, strict=True):
      for peer in PEERS_FLAG.value:
        if not peer.startswith('eager'):  # nothing to compile
          programs[peer] = Program({'peer': peer, **case})
  for programs, case in zip(started, cases, strict=True):
    results = measure(case, PEERS_FLAG.value, programs)
    show(results, peaks)
    peak = peaks[case['dtype']]
    machine = peak['device']
    if machine == 'cpu':
      machine = f'{processor()}, {os.cpu_count()} cores'
    context = {
      'date': datetime.date.today().isoformat(),
      'machine': machine,
      'peak_flops': peak['peak_flops'],
      'peak_bandwidth': peak['peak_bandwidth'],
      'flops': flops(case),
      'compiled_together': TOGETHER.value,
    }
    for result in results:
      key = {'peer': result['peer'], 'machine': machine, **case}
      saved = [r for r in saved if any(r[k] != v for k, v in key.items())]
      saved.append(context | result)
    if out:
      out.write_text(json.dumps(saved, indent=1))


if __name__ == '__main__':
  app.run(main)
