"""A dataset for benchmarks, in a module that other processes can import."""

import operator
from typing import SupportsIndex

from dualformer_jax.input_pipeline.dataset import Example, PreparedDataset


class ManyVideos(PreparedDataset):
  """A dataset as if it had 240,000 videos: shuffling a few takes longer."""

  def __len__(self) -> int:
    return 240_000

  def __getitem__(self, index: SupportsIndex) -> Example:
    return super().__getitem__(operator.index(index) % super().__len__())
