"""Draws what speed.py and its workers measured.

  pip install "dualformer_jax[benchmark]"
  python scripts/benchmarks/speed_plot.py docs/speed.json docs/speed.png
  python scripts/benchmarks/speed_plot.py docs/scaling.json docs/scaling.png

Of cases that differ in size, time and memory are drawn over tokens and over
clips; otherwise the clips that each program does in a second.
"""
# pyright: reportMissingImports=false
# (of the extra `benchmark`, which nothing else needs)

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
COLORS = dict(zip(NAMES, plt.get_cmap('tab10').colors, strict=False))


def tokens(result: dict[str, Any]) -> int:
  """Returns the tokens of a clip after the first patch embedding."""
  return result['num_frames'] // 2 * (result['image_size'] // 4) ** 2


def draw_speed(results: list[dict[str, Any]]) -> None:
  """Draws a bar of clips per second for each program, case by case."""
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
  bars = {}  # for the legend; a case may lack a program
  for axis in axes.flat[len(cases) :]:
    axis.remove()
  for axis, (name, programs) in zip(axes.flat, cases.items(), strict=False):
    for place, result in enumerate(programs):
      rate = result.get('clips_per_s', 0)
      peer = result['peer']
      bar = bars[NAMES[peer]] = axis.bar(place, rate, color=COLORS[peer])
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


def draw_scaling(results: list[dict[str, Any]]) -> None:
  """Draws time and memory over the tokens of a clip, and over clips."""
  figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharey='row')
  done = [result for result in results if 's' in result]
  single = [result for result in done if result['clips'] == 1]
  usual = [r for r in done if (r['num_frames'], r['image_size']) == (32, 224)]
  for column, (some, count, label) in enumerate(
    (
      (single, tokens, 'tokens of a clip'),
      (usual, lambda r: r['clips'], 'clips of 32 x 224 x 224 in a batch'),
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
  axes[0, 0].set_ylabel('seconds a batch')
  axes[1, 0].set_ylabel('peak memory of the process (GB)')
  axes[1, 0].legend(fontsize=8, loc='upper left')
  figure.tight_layout()


def main() -> None:
  """Draws the figures in one file into another."""
  source, target = sys.argv[1:]
  results = json.loads(pathlib.Path(source).read_text())
  of_one_size = len({tokens(result) for result in results}) == 1
  (draw_speed if of_one_size else draw_scaling)(results)
  plt.savefig(target, dpi=120)


if __name__ == '__main__':
  main()
