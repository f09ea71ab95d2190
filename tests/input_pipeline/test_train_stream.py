"""The stream of clips: epochs, repeats, balance, and unreadable videos."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dualformer_jax import errors
from dualformer_jax.input_pipeline import (
  train_stream,
  transforms,
  video_reader,
)
from dualformer_jax.input_pipeline.dataset import Example, PreparedDataset
from tests.input_pipeline.loaders import (
  BROKEN,
  assert_same,
  copy_with_damage,
  ids,
  open_dataset,
  rows_of,
  take,
  train_loader,
  wait_for_threads,
)


def test_every_epoch_has_every_video_once_in_a_new_order(make_loader):
  # 44 videos, four epochs of 11; batches reach from one into the next.
  names = ids(take(make_loader(), 11))
  epochs = [tuple(names[start : start + 11]) for start in range(0, 44, 11)]
  for epoch in epochs:
    assert sorted(epoch) == sorted(f'train/{index}' for index in range(11))
  assert len(set(epochs)) == 4


def test_seed_determines_the_stream(make_loader):
  first, again, other = (take(make_loader(seed=seed), 3) for seed in (7, 7, 8))
  for a, b in zip(first, again, strict=True):
    assert_same(a, b)
  assert ids(first) != ids(other)


def test_clips_of_a_video_differ_between_epochs(make_loader):
  seen: dict[str, set[bytes]] = {}
  for batch in take(make_loader(random_crop=False), 22):
    for name, clip in zip(batch['video_ids'], batch['clips'], strict=True):
      seen.setdefault(name, set()).add(clip[0].tobytes())
  # Eight clips of each, of the five that there are (offsets 0 to 4).
  assert sum(len(clips) for clips in seen.values()) > 11 * 3


def test_broken_video_is_replaced_by_the_next_and_logged_once(
  make_loader, logged_warnings
):
  # Three epochs; names and order are those of the dataset without flaws.
  intended = ids(take(make_loader(), 9))
  found = ids(take(make_loader('flawed'), 8))
  expected = []
  for place in range(32):
    while intended[place] in BROKEN:
      place += 1
    expected.append(intended[place])
  assert found == expected
  assert len(logged_warnings) == 3
  for name in BROKEN:
    (message,) = (m for m in logged_warnings if f'Video {name} ' in m)
    assert 'cannot be decoded' in message
    assert '\n' not in message


def test_replacement_does_not_depend_on_hosts_or_threads(make_loader):
  expected = take(make_loader('flawed'), 8)
  parts = [
    take(make_loader('flawed', rows=rows_of(4, i, 2), num_threads=5), 8)
    for i in range(2)
  ]
  for number, batch in enumerate(expected):
    clips = np.concatenate([part[number]['clips'] for part in parts])
    np.testing.assert_array_equal(clips, batch['clips'])


def test_damaged_record_is_replaced(
  prepared_datasets, tmp_path, logged_warnings
):
  dataset = open_dataset(copy_with_damage(prepared_datasets, tmp_path))
  iterator = train_loader(
    dataset, batch_size=11, seed=0, num_threads=2, prefetch=1
  )
  names = next(iterator)['video_ids']
  assert len(set(names)) == 10
  (path,) = tmp_path.rglob('*train.tfrecord-00000*')
  reason = f'({path}, at byte 0): its checksum is wrong'
  (warning,) = logged_warnings
  assert 'Video record 0 ' in warning
  assert 'is replaced by the next one' in warning
  assert reason in warning
  iterator.close()


@pytest.mark.parametrize('threads', [1, 4])
def test_no_readable_video_raises(prepared_datasets, monkeypatch, threads):
  def fail(video: Any, *args: Any, **kwargs: Any) -> None:
    raise video_reader.VideoError('cannot be decoded: broken')

  monkeypatch.setattr(transforms, 'train_clips', fail)
  iterator = train_loader(
    open_dataset(prepared_datasets),
    batch_size=4,
    seed=0,
    num_threads=threads,
  )
  with pytest.raises(errors.UserError, match='11 videos .* cannot be read'):
    next(iterator)
  iterator.close()


def test_other_errors_are_not_caught(prepared_datasets, monkeypatch):
  def fail(video: Any, *args: Any, **kwargs: Any) -> None:
    raise TypeError('mistake')

  monkeypatch.setattr(transforms, 'train_clips', fail)
  iterator = train_loader(open_dataset(prepared_datasets), batch_size=4, seed=0)
  with pytest.raises(TypeError, match='mistake'):
    next(iterator)
  iterator.close()


def test_repeats_read_a_video_once(make_loader, monkeypatch):
  wait_for_threads()  # Those of other tests.
  read = []
  getitem = PreparedDataset.__getitem__

  def count(self: Any, index: int) -> Example:
    example = getitem(self, index)
    read.append(example.video_id)
    return example

  monkeypatch.setattr(PreparedDataset, '__getitem__', count)
  iterator = make_loader(batch_size=12, repeats=3, num_threads=1)
  batches = take(iterator, 3)
  iterator.close()
  monkeypatch.undo()
  intended = ids(take(make_loader(), 3))
  assert ids(batches) == [name for name in intended for _ in range(3)]
  assert read[:12] == intended
  assert len(read) <= 5 * 4  # Two batches more are read ahead.
  for batch in batches:
    np.testing.assert_array_equal(
      batch['labels'][::3].repeat(3), batch['labels']
    )


def test_repeats_draw_different_frames(make_loader):
  (batch,) = take(make_loader(batch_size=40, repeats=40), 1)
  levels = batch['clips'].mean((2, 3, 4))
  np.testing.assert_allclose(
    levels - levels[:, :1], np.tile([0, 2, 4, 6], (40, 1)), atol=1
  )
  # Clips of 7 of the 12 frames begin at the first five, whose brightness rises.
  assert np.ptp(levels[:, 0]) == pytest.approx(4, abs=1)
  assert len(np.unique(np.rint(levels[:, 0]))) >= 4


def test_epoch_of_repeats_has_every_video_equally_often(make_loader):
  names = ids(take(make_loader(repeats=2), 22))  # 44 videos, twice each
  for start in range(0, 88, 22):
    epoch = names[start : start + 22]
    assert sorted(epoch) == sorted(2 * [f'train/{i}' for i in range(11)])


@pytest.mark.parametrize('hosts', [1, 2])
def test_repeats_and_operations_do_not_depend_on_hosts_or_threads(
  make_loader, hosts
):
  options = {'batch_size': 8, 'repeats': 2, 'rand_augment_ops': 2}
  expected = take(make_loader('flawed', **options), 5)
  parts = [
    take(
      make_loader(
        'flawed',
        **options,
        rows=rows_of(8, index, hosts),
        num_threads=5,
        prefetch=3,
      ),
      5,
    )
    for index in range(hosts)
  ]
  for number, batch in enumerate(expected):
    assert not BROKEN & set(batch['video_ids'])
    for name, value in batch.items():
      rows = [part[number][name] for part in parts]
      np.testing.assert_array_equal(np.concatenate(rows), value)


@pytest.mark.parametrize('position', [8, 12, 13, 15])
def test_run_resumes_between_the_clips_of_a_video(make_loader, position):
  options = {'repeats': 4, 'rand_augment_ops': 1}
  expected = take(make_loader(batch_size=4, **options), 8)
  whole = {
    name: np.concatenate([batch[name] for batch in expected])
    for name in expected[0]
  }
  iterator = make_loader(batch_size=8, **options)
  iterator.set_state(iterator.get_state() | {'position': position})
  for start in (position, position + 8):
    for name, value in next(iterator).items():
      np.testing.assert_array_equal(value, whole[name][start : start + 8])


def test_repeats_that_do_not_fit_a_host_raise(make_loader):
  make_loader(batch_size=8, repeats=4, rows=rows_of(8, 0, 2))
  make_loader(batch_size=8, repeats=2, rows=[2, 3, 6, 7])
  with pytest.raises(errors.UserError, match='repeats is 3, .* the 4 rows'):
    make_loader(repeats=3)
  with pytest.raises(errors.UserError, match='repeats is 4, .* the 2 rows'):
    make_loader(repeats=4, rows=rows_of(4, 0, 2))
  with pytest.raises(errors.UserError, match='are not runs of that'):
    make_loader(batch_size=8, repeats=2, rows=[0, 2, 4, 6])


def test_rand_augment_changes_neither_frames_nor_crops(
  make_loader,
):
  plain = take(make_loader(random_crop=True), 10)
  drawn = take(make_loader(rand_augment_ops=2, rand_augment_magnitude=5), 10)
  ops = np.concatenate([batch['color_ops'] for batch in drawn])
  magnitudes = np.concatenate([batch['magnitudes'] for batch in drawn])
  assert ops.shape == magnitudes.shape == (40, 2)
  assert ops.dtype == np.int32
  assert magnitudes.dtype == np.float32
  np.testing.assert_array_equal(np.abs(magnitudes), 0.5)
  assert len({tuple(row) for row in ops}) > 20
  warped = 0
  for before, after in zip(plain, drawn, strict=True):
    assert before['video_ids'] == after['video_ids']
    for row, (a, b) in enumerate(
      zip(before['clips'], after['clips'], strict=True)
    ):
      if np.all(after['color_ops'][row]):  # no geometric ones
        np.testing.assert_array_equal(a, b)
      else:
        warped += not np.array_equal(a, b)
  assert warped > 10


def test_one_video_fills_any_batch(prepared_datasets, monkeypatch):
  dataset = open_dataset(prepared_datasets)
  monkeypatch.setattr(type(dataset), '__len__', lambda self: 1)
  iterator = train_loader(dataset, batch_size=3, seed=0, num_threads=1)
  assert len(set(ids(take(iterator, 2)))) == 1
  iterator.close()


def test_class_balanced_draws_classes_equally_often(prepared_datasets):
  dataset = open_dataset(prepared_datasets)
  labels = dataset.labels()
  np.testing.assert_array_equal(
    labels, [dataset[i].label for i in range(len(dataset))]
  )
  present = sorted(set(labels.tolist()))
  assert len({np.count_nonzero(labels == k) for k in present}) > 1
  order = train_stream._video_order(
    dataset, train_stream.TrainOptions(7, class_balanced=True)
  )
  rounds = [
    [int(labels[order[turn * len(present) + i]]) for i in range(len(present))]
    for turn in range(12)
  ]
  assert all(sorted(classes) == present for classes in rounds)
  assert len({tuple(classes) for classes in rounds}) > 1
  # Of each class, every video before any comes again.
  for label in present:
    members = np.flatnonzero(labels == label)
    places = [
      order[turn * len(present) + rounds[turn].index(label)]
      for turn in range(len(members))
    ]
    assert sorted(places) == members.tolist()
  again = open_dataset(prepared_datasets)  # from what was kept
  np.testing.assert_array_equal(again.labels(), labels)
