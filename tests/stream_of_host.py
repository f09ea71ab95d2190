"""What a host reads; printed by `python -m tests.stream_of_host '{...}'`.

As a process of its own, as hosts are; a line of JSON for each batch.
"""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any

from dualformer_jax.input_pipeline import loader, records, views


def read(asked: dict[str, Any]) -> list[dict[str, Any]]:
  """The rows of each batch, and the state after it."""
  dataset = records.PreparedDataset('levels', 'train', asked['data_dir'])
  clips = loader.train_loader(
    dataset,
    views.Preprocessing(4, 2, 24),
    batch_size=asked['batch_size'],
    seed=3,
    rows=asked['rows'],
    num_threads=asked['num_threads'],
    short_side=30,
  )
  if asked['state']:
    clips.set_state(asked['state'])
  batches = []
  for _ in range(asked['batches']):
    batch = next(clips)
    rows = [
      [name, int(label), hashlib.sha256(clip.tobytes()).hexdigest()]
      for name, label, clip in zip(
        batch['video_ids'], batch['labels'], batch['clips'], strict=True
      )
    ]
    batches.append({'rows': rows, 'state': clips.get_state()})
  clips.close()
  return batches


def main() -> None:
  for batch in read(json.loads(sys.argv[1])):
    print(json.dumps(batch))


if __name__ == '__main__':
  main()
