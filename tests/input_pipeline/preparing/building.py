"""Builds datasets in this process, and reads them."""

import json
import os
import pathlib
from typing import Any

import pytest
import tensorflow_datasets as tfds

from dualformer_jax.input_pipeline.dataset import Example, PreparedDataset
from dualformer_jax.input_pipeline.preparing import builder, video_store


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
  """Transcodes without starting processes, which takes seconds."""
  monkeypatch.setattr(
    video_store.VideoStore,
    'add_all',
    lambda store, videos, num_processes: map(store.add, videos),
  )


def write(path: pathlib.Path, content: bytes) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content)


def build(
  dataset: builder.VideoDatasetBuilder, manual_dir: pathlib.Path
) -> dict[str, Any]:
  """Builds a dataset; returns its report."""
  dataset.download_and_prepare(
    download_config=tfds.download.DownloadConfig(
      manual_dir=manual_dir, try_download_gcs=False
    )
  )
  return read_report(pathlib.Path(dataset.data_path))


def read_report(folder: pathlib.Path) -> dict[str, Any]:
  return json.loads((folder / 'report.json').read_text('utf-8'))


def read_split(
  folder: str | os.PathLike[str], split: str
) -> dict[str, Example]:
  """Returns the examples of a split by video_id."""
  dataset = PreparedDataset(os.fspath(folder), split, '')
  examples = [dataset[index] for index in range(len(dataset))]
  return {example.video_id: example for example in examples}
