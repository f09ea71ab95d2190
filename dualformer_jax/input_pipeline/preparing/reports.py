"""The report of a prepared dataset, and its summary in plain text."""

import collections
from collections.abc import Sequence
import dataclasses
import hashlib
import itertools
import json
import pathlib
from typing import Any

from dualformer_jax.input_pipeline.dataset import NEAR_DUPLICATES
from dualformer_jax.input_pipeline.preparing import near_duplicates, video_store

REPORT = 'report.json'
SUMMARY = 'summary.txt'
MISSING = 'missing.txt'
_MAX_LISTED = 20  # Of a kind, in the summary.


@dataclasses.dataclass(frozen=True)
class Entry:
  """A video of the dataset; its labels are indices of classes."""

  split: str
  video_id: str
  labels: tuple[int, ...]
  stored: video_store.StoredVideo


def make_report(
  dataset: str,
  class_names: Sequence[str],
  entries: Sequence[Entry],
  findings: dict[str, Any],
) -> dict[str, Any]:
  """Returns the report; the order of entries does not matter."""
  splits: dict[str, Any] = {}
  content = hashlib.sha256()
  entries = sorted(entries, key=lambda entry: (entry.split, entry.video_id))
  for entry in entries:
    split = splits.setdefault(
      entry.split,
      {'videos': 0, 'bytes': 0, 'classes': dict.fromkeys(class_names, 0)},
    )
    split['videos'] += 1
    split['bytes'] += entry.stored.num_bytes
    for label in entry.labels:
      split['classes'][class_names[label]] += 1
    line = [entry.split, entry.video_id, entry.labels, entry.stored.sha256]
    content.update(json.dumps(line).encode() + b'\n')
  return {
    'dataset': dataset,
    'fingerprint': content.hexdigest(),
    'splits': splits,
    NEAR_DUPLICATES: _find_near_duplicates(entries),
    **findings,
  }


def _find_near_duplicates(entries: Sequence[Entry]) -> list[dict[str, Any]]:
  """Finds near-duplicates of videos in other splits, for each two splits."""
  splits: dict[str, list[Entry]] = collections.defaultdict(list)
  for entry in entries:
    splits[entry.split].append(entry)
  found = []
  # `train` first: what counts are the copies of its videos in other splits.
  names = sorted(splits, key=lambda name: (name != 'train', name))
  for a, b in itertools.combinations(names, 2):
    identical = {entry.stored.sha256: entry.video_id for entry in splits[a]}
    copies = {
      entry.video_id: identical[entry.stored.sha256]
      for entry in splits[b]
      if entry.stored.sha256 in identical
    }
    others = [entry for entry in splits[b] if entry.video_id not in copies]
    for i, j in near_duplicates.find(
      [entry.stored.signature for entry in splits[a]],
      [entry.stored.signature for entry in others],
    ):
      copies[others[j].video_id] = splits[a][i].video_id
    if copies:
      videos = [[copies[video], video] for video in sorted(copies)]
      found.append({'splits': [a, b], 'videos': videos})
  return found


def write(folder: pathlib.Path, report: dict[str, Any]) -> str:
  """Writes the report and its summary into a folder; returns the summary."""
  text = json.dumps(report, indent=2, ensure_ascii=False)
  write_text(folder / REPORT, f'{text}\n')
  summary = '\n'.join(_summarize(report)) + '\n'
  write_text(folder / SUMMARY, summary)
  return summary


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes UTF-8; names of files need not be valid UTF-8."""
  path.write_text(text, encoding='utf-8', errors='backslashreplace')


def _summarize(report: dict[str, Any]) -> list[str]:
  lines = [f'{report["dataset"]}, fingerprint {report["fingerprint"]}']
  listed, missing = report.get('listed', {}), report.get('missing_videos', {})
  for name, split in report['splits'].items():
    counts = split['classes'].values()
    line = (
      f'{name}: {_videos(split["videos"])}, {split["bytes"] / 1e6:.1f} MB,'
      f' {sum(count > 0 for count in counts)} of {len(counts)} classes'
    )
    if name in listed:
      line += f'; {missing.get(name, 0)} of {listed[name]} listed are missing'
    lines.append(line)
  for split, classes in report.get('missing', {}).items():
    worst = sorted(classes.items(), key=lambda item: -item[1])[:5]
    text = ', '.join(f'{name} {count}' for name, count in worst)
    lines.append(f'most missing in {split}: {text}')
  if 'found' in report:
    bad = report['undecodable']
    lines.append(f'{len(bad)} of {_videos(report["found"])} cannot be decoded')
    lines += _first(f'{item["video_id"]}: {item["reason"]}' for item in bad)
  for copies in report[NEAR_DUPLICATES]:
    first, second = copies['splits']
    lines.append(
      f'near-duplicates of videos of {first}: {_videos(len(copies["videos"]))}'
      f' of {second}; scores on {second} will be too high'
    )
    lines += _first(f'{b} duplicates {a}' for a, b in copies['videos'])
  return lines + report.get('notes', [])


def _videos(count: int) -> str:
  return f'{count} video{"s" * (count != 1)}'


def _first(items: Any) -> list[str]:
  lines = [f'  {item}' for item in items]
  if more := lines[_MAX_LISTED:]:
    lines[_MAX_LISTED:] = [f'  and {len(more)} more, see {REPORT}']
  return lines
