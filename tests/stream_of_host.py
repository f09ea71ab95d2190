"""Prints what a host reads: `python -m tests.stream_of_host '{...}'`.

A process of its own, as hosts are; a line of JSON for each batch.
"""

from __future__ import annotations

import hashlib
import json
import sys

from dualformer_jax.input_pipeline import loader, records, views


def main() -> None:
  asked = json.loads(sys.argv[1])
  dataset = records.PreparedDataset('levels', 'train', asked['data_dir'])
  clips = loader.train_loader(
    dataset,
    views.Preprocessing(4, 2, 24),
    batch_size=asked['batch_size'],
    seed=3,
    process_index=asked['process_index'],
    process_count=asked['process_count'],
    num_threads=asked['num_threads'],
    short_side=30,
  )
  if asked['state']:
    clips.set_state(asked['state'])
  for _ in range(asked['batches']):
    batch = next(clips)
    rows = [
      [name, int(label), hashlib.sha256(clip.tobytes()).hexdigest()]
      for name, label, clip in zip(
        batch['video_ids'], batch['labels'], batch['clips'], strict=True
      )
    ]
    print(json.dumps({'rows': rows, 'state': clips.get_state()}), flush=True)
  clips.close()


if __name__ == '__main__':
  main()
