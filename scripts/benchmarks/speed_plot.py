"""Plots the figures of speed.py.

  pip install -e '.[benchmark]'
  python scripts/benchmarks/speed_plot.py docs/speed.json docs/speed.png
  python scripts/benchmarks/speed_plot.py docs/scaling.json docs/scaling.png

If the cases differ in size, plots time and memory over tokens and over clips;
otherwise the clips per second of each program.
"""
# pyright: reportMissingImports=false
# (matplotlib is in the extra `benchmark`, which nothing else needs)

import json
import math
import pathlib
import sys
from typing import Any

import matplotlib

matplotlib.use('agg')
from matplotlib import pyplot as plt

NAMES = {
  'jax': 'dualformer_jax',
  'jax-full': 'full space-time attention',
  'eager': 'PyTorch, eager',
  'eager-sdpa': 'PyTorch, eager, SDPA',
  'compile': 'PyTorch, compiled',
  'compile-sdpa': 'PyTorch, compiled, SDPA',
  'eager-kept': 'PyTorch, eager, memory kept',
}
MARKERS = {112: 'v', 224: 'o', 448: '^'}
COLORS = dict(zip(NAMES, plt.color_sequences['tab10'], strict=False))


def count_tokens(result: dict[str, Any]) -> int:
  """Returns the tokens per clip after the first patch embedding."""
  return result['num_frames'] // 2 * (result['image_size'] // 4) ** 2


def plot_speed(results: list[dict[str, Any]]) -> None:
  """Plots a bar of clips per second for each program of each case."""
  cases: dict[str, list[dict[str, Any]]] = {}
  for result in results:
    if result['stage']:
      continue
    name = '{variant} {pass}\n{dtype}, batch {clips}'.format(**result)
    cases.setdefault(name, []).append(result)
  rows = math.ceil(len(cases) / 6)
  columns = math.ceil(len(cases) / rows)
  figure, axes = plt.subplots(
    rows,
    columns,
    figsize=(max(1.6 * columns + 1, 8), 2.8 * rows + 0.8),
    squeeze=False,
  )
  bars = {}  # for the legend, as a case can lack a program
  for axis in axes.flat[len(cases) :]:
    axis.remove()
  for axis, (name, programs) in zip(axes.flat, cases.items(), strict=False):
    for index, result in enumerate(programs):
      rate = result.get('clips_per_s', 0)
      peer = result['peer']
      bar = bars[NAMES[peer]] = axis.bar(index, rate, color=COLORS[peer])
      axis.bar_label(bar, [f'{rate:.3g}'], fontsize=8)
    axis.set_title(name, fontsize=8)
    axis.set_xticks([])
    axis.margins(y=0.12)
    axis.spines[['top', 'right']].set_visible(False)
  for axis in axes[:, 0]:
    axis.set_ylabel('clips per second')
  figure.legend(
    bars.values(),
    bars.keys(),
    loc='lower center',
    ncols=min(len(bars), 4),
    fontsize=8,
  )
  figure.tight_layout(rect=(0, 0.4 / figure.get_figheight(), 1, 1))


def plot_scaling(results: list[dict[str, Any]]) -> None:
  """Plots time and memory over tokens per clip, and over clips per batch."""
  figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharey='row')
  done = [result for result in results if 's' in result]
  single = [result for result in done if result['clips'] == 1]
  default_size = [
    r for r in done if (r['num_frames'], r['image_size']) == (32, 224)
  ]
  for column, (some, count, label) in enumerate(
    (
      (single, count_tokens, 'tokens per clip'),
      (default_size, lambda r: r['clips'], 'clips of 32 x 224 x 224 per batch'),
    )
  ):
    lines = dict.fromkeys((r['peer'], r['image_size']) for r in some)
    for peer, pixels in lines:
      found = sorted(
        (r for r in some if (r['peer'], r['image_size']) == (peer, pixels)),
        key=count,
      )
      style = dict(
        marker=MARKERS.get(pixels, 'x'),
        color=COLORS[peer],
        label=f'{NAMES[peer]}, {pixels} pixels',
      )
      at = [count(result) for result in found]
      time, memory = axes[:, column]
      time.plot(at, [r['s'] for r in found], **style)
      memory.plot(at, [r['peak_bytes'] / 1e9 for r in found], **style)
    axes[1, column].set_xlabel(label)
  for axis in axes.flat:
    axis.set(xscale='log', yscale='log')
    axis.spines[['top', 'right']].set_visible(False)
    axis.grid(alpha=0.3)
  axes[0, 0].set_ylabel('seconds per batch')
  axes[1, 0].set_ylabel('peak memory of the process (GB)')
  axes[1, 0].legend(fontsize=8, loc='upper left')
  figure.tight_layout()


def main() -> None:
  """Plots the figures of a JSON file into an image."""
  source, target = sys.argv[1:]
  results = json.loads(pathlib.Path(source).read_text())
  is_one_size = len({count_tokens(result) for result in results}) == 1
  (plot_speed if is_one_size else plot_scaling)(results)
  plt.savefig(target, dpi=120)


if __name__ == '__main__':
  main()
