"""Prints what a host reads: `python -m tests.stream_of_host '[{...}, ...]'`.

Run as a separate process for each host; prints a line of JSON per request.
"""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any

from dualformer_jax.input_pipeline import loader, transforms
from dualformer_jax.input_pipeline.dataset import PreparedDataset


def read(request: dict[str, Any]) -> list[dict[str, Any]]:
  """Returns the rows of each batch, and the state after it."""
  dataset = PreparedDataset('levels', 'train', request['data_dir'])
  clips = loader.TrainLoader(
    dataset,
    transforms.Preprocessing(4, 2, 24),
    loader.TrainOptions(seed=3, short_side=30),
    request['batch_size'],
    request['rows'] or range(request['batch_size']),
    num_threads=request['num_threads'],
  )
  if request['state']:
    clips.set_state(request['state'])
  batches = []
  for _ in range(request['batches']):
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
  for request in json.loads(sys.argv[1]):
    print(json.dumps(read(request)))


if __name__ == '__main__':
  main()
