"""Batches: the same stream for any hosts and threads, resumed exactly."""

from __future__ import annotations

from collections.abc import Iterator
import json
import logging
import pathlib
import shutil
import subprocess
import sys
import threading
import time
from typing import Any

from absl import logging as absl_logging
import numpy as np
import pytest

from dualformer_jax import errors
from dualformer_jax.input_pipeline import decoding, loader, records, views
from tests import conftest, stream_of_host

PREPROCESSING = views.Preprocessing(4, 2, 24, num_clips=2, num_crops=3)
# Of the dataset `flawed`, in tests/levels_datasets.py.
BROKEN = {'train/3', 'train/4', 'train/8'}


def open_dataset(
  folder: pathlib.Path, name: str = 'levels', split: str = 'train'
) -> records.PreparedDataset:
  return records.PreparedDataset(name, split, str(folder / 'tfrecord'))


@pytest.fixture
def make_loader(
  prepared_datasets: pathlib.Path,
) -> Iterator[Any]:
  """Makes training loaders, and ends their threads after the test."""
  made = []

  def make(name: str = 'levels', **arguments: Any) -> loader.TrainIterator:
    defaults: dict[str, Any] = {
      'batch_size': 4,
      'seed': 7,
      'num_threads': 2,
      'prefetch': 1,
      'short_side': 30,
    }
    made.append(
      loader.train_loader(
        open_dataset(prepared_datasets, name),
        PREPROCESSING,
        **(defaults | arguments),
      )
    )
    return made[-1]

  yield make
  for iterator in made:
    iterator.close()


def take(iterator: Iterator[Any], count: int) -> list[Any]:
  return [next(iterator) for _ in range(count)]


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(found[name], value)


def rows_of(batch_size: int, host: int, hosts: int) -> range:
  """Rows of a batch that lies on hosts in their order."""
  count = batch_size // hosts
  return range(host * count, (host + 1) * count)


def ids(batches: list[dict[str, Any]]) -> list[str]:
  return [name for batch in batches for name in batch['video_ids']]


def test_batches_hold_clips_labels_and_names(make_loader):
  for batch in take(make_loader(), 3):
    assert set(batch) == {'clips', 'labels', 'video_ids'}
    assert batch['clips'].shape == (4, 4, 24, 24, 3)
    assert batch['clips'].dtype == np.uint8
    assert batch['labels'].dtype == np.int32
    for clip, label, name in zip(
      batch['clips'], batch['labels'], batch['video_ids'], strict=True
    ):
      index = int(name.removeprefix('train/'))
      assert label == index % 3
      # Every other one of 12 frames, of brightness 20 + 17 index + frame.
      levels = clip.mean((1, 2, 3)) - 20 - 17 * index
      np.testing.assert_allclose(levels - levels[0], [0, 2, 4, 6], atol=1)
      assert -1 < levels[0] < 6


def test_several_labels_are_given_as_ones(make_loader):
  for batch in take(make_loader('levels_multi'), 3):
    assert batch['labels'].dtype == np.float32
    assert batch['labels'].shape == (4, 3)
    for row, name in zip(batch['labels'], batch['video_ids'], strict=True):
      count = int(name.removeprefix('train/')) % 4
      np.testing.assert_array_equal(row, np.arange(3) < count)


def host_of(data_dir: pathlib.Path, asked: dict[str, Any]) -> dict[str, Any]:
  """What a host is to read; see tests/stream_of_host.py."""
  defaults = {
    'data_dir': str(data_dir / 'tfrecord'),
    'batch_size': 4,
    'rows': None,
    'num_threads': 2,
    'batches': 11,
    'state': None,
  }
  return defaults | asked


def streams(data_dir: pathlib.Path, *asked: dict[str, Any]) -> list[Any]:
  """What hosts read that run at the same time, each a process."""
  hosts = [
    subprocess.Popen(
      [
        sys.executable,
        '-m',
        'tests.stream_of_host',
        json.dumps(host_of(data_dir, host)),
      ],
      cwd=conftest.REPOSITORY,
      stdout=subprocess.PIPE,
      text=True,
    )
    for host in asked
  ]
  outputs = [host.communicate(timeout=120)[0] for host in hosts]
  assert [host.returncode for host in hosts] == [0] * len(hosts)
  return [list(map(json.loads, output.splitlines())) for output in outputs]


def test_two_hosts_read_what_one_does_and_go_on_at_any_step(prepared_datasets):
  # As a mesh may have it: a device of each host in turn.
  left_rows, right_rows = {'rows': [0, 2]}, {'rows': [1, 3]}
  alone = stream_of_host.read(host_of(prepared_datasets, {'num_threads': 1}))
  first, second = streams(
    prepared_datasets, left_rows, right_rows | {'num_threads': 5}
  )
  for one, left, right in zip(alone, first, second, strict=True):
    assert one['rows'][::2] == left['rows']
    assert one['rows'][1::2] == right['rows']
    assert one['state'] == left['state'] == right['state']
  # 44 clips are four epochs of 11 videos: each once, on one of the hosts.
  names = [row[0] for one in alone for row in one['rows']]
  for epoch in range(4):
    assert len(set(names[11 * epoch : 11 * epoch + 11])) == 11
  # What one host began, two go on with; and the other way round.
  state = first[5]['state']
  go_on = {'state': state, 'batches': 5}
  resumed = stream_of_host.read(host_of(prepared_datasets, go_on))
  left, right = streams(
    prepared_datasets, left_rows | go_on, right_rows | go_on
  )
  assert resumed == alone[6:]
  assert left == first[6:]
  assert right == second[6:]


def test_every_video_comes_once_an_epoch_in_ever_new_order(make_loader):
  # 44 videos, four epochs of 11; batches reach from one into the next.
  names = ids(take(make_loader(), 11))
  epochs = [tuple(names[start : start + 11]) for start in range(0, 44, 11)]
  for epoch in epochs:
    assert sorted(epoch) == sorted(f'train/{index}' for index in range(11))
  assert len(set(epochs)) == 4


def test_the_seed_decides_on_order_frames_and_crops(make_loader):
  first, again, other = (take(make_loader(seed=seed), 3) for seed in (7, 7, 8))
  for a, b in zip(first, again, strict=True):
    assert_same(a, b)
  assert ids(first) != ids(other)


def test_clips_of_a_video_differ_from_epoch_to_epoch(make_loader):
  seen: dict[str, set[bytes]] = {}
  for batch in take(make_loader(random_crop=False), 22):
    for name, clip in zip(batch['video_ids'], batch['clips'], strict=True):
      seen.setdefault(name, set()).add(clip[0].tobytes())
  # Eight clips of each, of the five that there are (offsets 0 to 4).
  assert sum(len(clips) for clips in seen.values()) > 11 * 3


@pytest.mark.parametrize('hosts', [2, 4])
def test_hosts_get_their_rows_of_the_same_global_batches(make_loader, hosts):
  expected = take(make_loader(), 6)
  parts = [
    take(make_loader(rows=rows_of(4, index, hosts)), 6)
    for index in range(hosts)
  ]
  for number, batch in enumerate(expected):
    for name, value in batch.items():
      rows = [part[number][name] for part in parts]
      assert all(len(part) == 4 // hosts for part in rows)
      np.testing.assert_array_equal(np.concatenate(rows), value)


@pytest.mark.parametrize('threads', [1, 8])
def test_threads_and_reading_ahead_do_not_change_the_stream(
  make_loader, threads
):
  expected = take(make_loader(), 6)
  found = take(make_loader(num_threads=threads, prefetch=threads), 6)
  for a, b in zip(found, expected, strict=True):
    assert_same(a, b)


@pytest.mark.parametrize('position', [0, 1, 6])
def test_a_run_goes_on_exactly_where_it_was_interrupted(make_loader, position):
  expected = take(make_loader(), position + 3)
  interrupted = make_loader(num_threads=4, prefetch=3)
  take(interrupted, position)
  # As it is kept, in a JSON file.
  state = json.loads(json.dumps(interrupted.get_state()))
  assert state['position'] == 4 * position
  interrupted.close()
  resumed = make_loader()
  resumed.set_state(state)
  for found, batch in zip(take(resumed, 3), expected[position:], strict=True):
    assert_same(found, batch)
  assert resumed.get_state()['position'] == 4 * (position + 3)


def test_an_iterator_can_be_set_back(make_loader):
  iterator = make_loader(prefetch=2)
  take(iterator, 1)
  state = iterator.get_state()
  first = take(iterator, 3)
  iterator.set_state(state)
  for found, batch in zip(take(iterator, 3), first, strict=True):
    assert_same(found, batch)


def test_a_run_goes_on_with_another_number_of_hosts(make_loader):
  expected = take(make_loader(), 5)
  before = [make_loader(rows=rows_of(4, i, 4)) for i in range(4)]
  for iterator in before:
    take(iterator, 3)
  states = [iterator.get_state() for iterator in before]
  assert all(state == states[0] for state in states)
  after = [make_loader(rows=rows_of(4, i, 2)) for i in range(2)]
  for iterator in after:
    iterator.set_state(states[0])
  for batch in expected[3:]:
    clips = [next(iterator)['clips'] for iterator in after]
    np.testing.assert_array_equal(np.concatenate(clips), batch['clips'])


def test_a_state_of_another_run_is_refused(make_loader):
  state = make_loader().get_state()
  with pytest.raises(errors.UserError, match='seed is 8, .* began with 7'):
    make_loader(seed=8).set_state(state)
  with pytest.raises(errors.UserError, match='not the dataset that this run'):
    make_loader('flawed').set_state(state)
  for malformed in ({}, state | {'position': 'x'}, {'position': 4}):
    with pytest.raises(errors.UserError, match='malformed'):
      make_loader().set_state(malformed)


def test_batches_are_not_changed_by_those_that_follow(make_loader):
  iterator = make_loader()
  batches = take(iterator, 4)
  copies = [batch['clips'].copy() for batch in batches]
  take(iterator, 4)
  for batch, copy in zip(batches, copies, strict=True):
    np.testing.assert_array_equal(batch['clips'], copy)


@pytest.fixture
def warnings_logged() -> Iterator[list[str]]:
  messages = []

  class Keep(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
      messages.append(record.getMessage())

  handler = Keep(logging.WARNING)
  absl_logging.get_absl_logger().addHandler(handler)
  yield messages
  absl_logging.get_absl_logger().removeHandler(handler)


def test_a_broken_video_is_replaced_by_the_next_and_logged_once(
  make_loader, warnings_logged
):
  # Three epochs; names and order are those of the dataset without flaws.
  intended = ids(take(make_loader(), 9))
  iterator = make_loader('flawed')
  found = ids(take(iterator, 8))
  expected = []
  for place in range(32):
    while intended[place] in BROKEN:
      place += 1
    expected.append(intended[place])
  assert found == expected
  assert set(iterator.failed) == BROKEN
  assert len(warnings_logged) == 3
  for name in BROKEN:
    (message,) = (m for m in warnings_logged if f'Video {name} ' in m)
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


def damaged(folder: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
  """A copy of `levels` with one record of each split damaged."""
  shutil.copytree(
    folder / 'tfrecord' / 'levels',
    target / 'tfrecord' / 'levels',
    ignore=shutil.ignore_patterns('*.npz'),
  )
  for split in ('train', 'validation'):
    (path,) = target.rglob(f'*{split}.tfrecord-00000*')
    content = bytearray(path.read_bytes())
    content[300] ^= 1
    path.write_bytes(content)
  return target


def test_a_damaged_record_is_replaced_too(
  prepared_datasets, tmp_path, warnings_logged
):
  dataset = open_dataset(damaged(prepared_datasets, tmp_path))
  iterator = loader.train_loader(
    dataset, PREPROCESSING, batch_size=11, seed=0, num_threads=2, prefetch=1
  )
  names = next(iterator)['video_ids']
  assert len(set(names)) == 10
  assert list(iterator.failed) == ['record 0']
  (path,) = tmp_path.rglob('*train.tfrecord-00000*')
  reason = f'({path}, at byte 0): its checksum is wrong'
  assert reason in iterator.failed['record 0']
  (warning,) = warnings_logged
  assert 'the next one takes its place' in warning
  assert reason in warning
  iterator.close()


@pytest.mark.parametrize('threads', [1, 4])
def test_a_dataset_without_a_readable_video_ends_the_run(
  prepared_datasets, monkeypatch, threads
):
  def fail(video: Any, *args: Any, **kwargs: Any) -> None:
    raise decoding.VideoError('cannot be decoded: broken')

  monkeypatch.setattr(views, 'train_clip', fail)
  iterator = loader.train_loader(
    open_dataset(prepared_datasets),
    PREPROCESSING,
    batch_size=4,
    seed=0,
    num_threads=threads,
  )
  with pytest.raises(errors.UserError, match='11 videos .* cannot be read'):
    next(iterator)
  iterator.close()


def test_a_mistake_in_the_program_is_not_taken_for_a_broken_video(
  prepared_datasets, monkeypatch
):
  def fail(video: Any, *args: Any, **kwargs: Any) -> None:
    raise TypeError('mistake')

  monkeypatch.setattr(views, 'train_clip', fail)
  iterator = loader.train_loader(
    open_dataset(prepared_datasets), PREPROCESSING, batch_size=4, seed=0
  )
  with pytest.raises(TypeError, match='mistake'):
    next(iterator)
  iterator.close()


def test_videos_are_read_in_parallel_and_not_too_far_ahead(
  make_loader, monkeypatch
):
  lock, running, most, begun = threading.Lock(), 0, 0, 0
  four = threading.Barrier(4)
  train_clip = views.train_clip

  def slow(*args: Any, **kwargs: Any) -> np.ndarray:
    nonlocal running, most, begun
    with lock:
      running += 1
      begun += 1
      most = max(most, running)
      is_first = begun <= 4
    if is_first:
      four.wait(timeout=30)  # Fails unless four are at it together.
    with lock:
      running -= 1
    return train_clip(*args, **kwargs)

  wait_for_threads()  # Those of other tests.
  monkeypatch.setattr(views, 'train_clip', slow)
  iterator = make_loader(num_threads=4, prefetch=2)
  next(iterator)
  time.sleep(1)
  assert most == 4
  # The batch taken, two ahead, one stacked and one that waits to be.
  assert 4 * 3 <= begun <= 4 * 5


def wait_for_threads() -> list[str]:
  """Threads of Grain that are still there after a while."""
  names = ['not looked yet']
  end = time.monotonic() + 10
  while names and time.monotonic() < end:
    time.sleep(0.02)
    names = [t.name for t in threading.enumerate() if 'grain' in t.name]
  return names


def test_closing_ends_all_threads(make_loader, prepared_datasets):
  wait_for_threads()
  iterator = make_loader(num_threads=4, prefetch=2)
  next(iterator)
  assert any('grain' in thread.name for thread in threading.enumerate())
  iterator.close()
  assert wait_for_threads() == []
  dataset = open_dataset(prepared_datasets)
  batches = loader.test_loader(dataset, PREPROCESSING, batch_size=2)
  for _ in batches:
    break
  assert wait_for_threads() == []


def test_a_program_may_end_while_batches_are_read(prepared_datasets):
  program = """
import sys
from dualformer_jax.input_pipeline import loader, records, views
iterator = loader.train_loader(
  records.PreparedDataset('levels', 'train', sys.argv[1]),
  views.Preprocessing(4, 2, 24),
  batch_size=4,
  seed=0,
  prefetch=4,
)
for _ in range(3):
  next(iterator)
print('done')
"""
  result = subprocess.run(
    [sys.executable, '-c', program, prepared_datasets / 'tfrecord'],
    cwd=conftest.REPOSITORY,
    capture_output=True,
    text=True,
    check=False,
    timeout=60,
  )
  assert (result.returncode, result.stdout) == (0, 'done\n')
  assert 'Traceback' not in result.stderr


# --- Repeated augmentation


def test_each_video_is_read_once_for_several_clips_in_a_row(
  make_loader, monkeypatch
):
  wait_for_threads()  # Those of other tests.
  read = []
  getitem = records.PreparedDataset.__getitem__

  def count(self: Any, index: int) -> records.Example:
    example = getitem(self, index)
    read.append(example.video_id)
    return example

  monkeypatch.setattr(records.PreparedDataset, '__getitem__', count)
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


def test_repeated_clips_have_frames_of_their_own(make_loader):
  (batch,) = take(make_loader(batch_size=40, repeats=40), 1)
  levels = batch['clips'].mean((2, 3, 4))
  np.testing.assert_allclose(
    levels - levels[:, :1], np.tile([0, 2, 4, 6], (40, 1)), atol=1
  )
  # Clips of 7 of the 12 frames begin at the first five, whose brightness rises.
  assert np.ptp(levels[:, 0]) == pytest.approx(4, abs=1)
  assert len(np.unique(np.rint(levels[:, 0]))) >= 4


def test_a_repeated_clip_is_the_one_that_it_would_be_alone():
  frames = np.random.default_rng(0).integers(0, 256, (30, 36, 48, 3), np.uint8)
  preprocessing = views.Preprocessing(8, 2, 24)

  def rngs() -> list[np.random.Generator]:
    return [np.random.default_rng((7, place)) for place in range(4)]

  for video in (frames, decoding.encode_mp4(frames, fps=25)):
    together = views.train_clip(video, preprocessing, rngs(), short_side=30)
    assert together.shape == (4, 8, 24, 24, 3)
    for rng, clip in zip(rngs(), together, strict=True):
      alone = views.train_clip(video, preprocessing, rng, short_side=30)
      np.testing.assert_array_equal(alone, clip)
    assert len({clip.tobytes() for clip in together}) == 4


def test_an_epoch_of_repeats_has_every_video_as_often(make_loader):
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
def test_a_run_goes_on_inside_of_the_clips_of_a_video(make_loader, position):
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


def test_repeats_that_do_not_fit_a_host_are_refused(make_loader):
  make_loader(batch_size=8, repeats=4, rows=rows_of(8, 0, 2))
  make_loader(batch_size=8, repeats=2, rows=[2, 3, 6, 7])
  with pytest.raises(errors.UserError, match='repeats is 3, .* has 4 clips'):
    make_loader(repeats=3)
  with pytest.raises(errors.UserError, match='repeats is 4, .* has 2 clips'):
    make_loader(repeats=4, rows=rows_of(4, 0, 2))
  with pytest.raises(errors.UserError, match='do not lie in runs of that'):
    make_loader(batch_size=8, repeats=2, rows=[0, 2, 4, 6])
  with pytest.raises(errors.UserError, match='repeats is 0'):
    make_loader(repeats=0)


# --- RandAugment


def test_operations_come_with_clips_and_change_neither_frames_nor_crops(
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


def test_arguments_out_of_range_are_refused(make_loader, prepared_datasets):
  with pytest.raises(errors.UserError, match='must be 1 or more, got 0'):
    make_loader(batch_size=0)
  with pytest.raises(errors.UserError, match='num_threads and prefetch'):
    make_loader(num_threads=0)
  with pytest.raises(errors.UserError, match='seed must be in'):
    make_loader(seed=-1)
  with pytest.raises(errors.UserError, match='num_threads must be 1'):
    loader.test_loader(
      open_dataset(prepared_datasets),
      PREPROCESSING,
      batch_size=4,
      num_threads=0,
    )


def test_one_video_is_enough_for_any_batch(prepared_datasets, monkeypatch):
  dataset = open_dataset(prepared_datasets)
  monkeypatch.setattr(type(dataset), '__len__', lambda self: 1)
  iterator = loader.train_loader(
    dataset, PREPROCESSING, batch_size=3, seed=0, num_threads=1
  )
  assert len(set(ids(take(iterator, 2)))) == 1
  iterator.close()


@pytest.mark.parametrize('hosts', [1, 2, 3])
def test_every_video_is_tested_once_over_all_hosts(prepared_datasets, hosts):
  dataset = open_dataset(prepared_datasets)
  parts = [
    loader.test_loader(
      dataset,
      PREPROCESSING,
      batch_size=6,
      rows=rows_of(6, index, hosts),
      num_threads=3,
    )
    for index in range(hosts)
  ]
  seen = []
  for part in parts:
    assert len(part) == 2
    batches = list(part)
    assert len(batches) == 2
    for batch in batches:
      rows = 6 // hosts
      assert set(batch) == {'views', 'labels', 'mask', 'video_ids', 'failed'}
      assert batch['views'].shape == (rows, 6, 4, 24, 24, 3)
      assert batch['views'].dtype == np.uint8
      assert batch['labels'].shape == batch['mask'].shape == (rows,)
      assert batch['mask'].dtype == np.bool_
      assert batch['failed'] == []
      for pixels, label, valid, name in zip(
        batch['views'],
        batch['labels'],
        batch['mask'],
        batch['video_ids'],
        strict=True,
      ):
        if not valid:
          assert name == ''
          assert not pixels.any()
          continue
        seen.append(name)
        index = int(name.removeprefix('train/'))
        assert label == index % 3
        # Offsets int(1.25) and int(3.75) of 12 frames, crop by crop.
        levels = pixels.mean((1, 2, 3, 4)) - 20 - 17 * index
        np.testing.assert_allclose(levels, [4, 6] * 3, atol=1)
  assert len(seen) == 11
  assert set(seen) == {f'train/{index}' for index in range(11)}


def test_hosts_test_their_rows_of_the_same_global_batches(prepared_datasets):
  dataset = open_dataset(prepared_datasets)
  whole = list(loader.test_loader(dataset, PREPROCESSING, batch_size=6))
  parts = [
    list(
      loader.test_loader(
        dataset,
        PREPROCESSING,
        batch_size=6,
        rows=rows_of(6, index, 2),
      )
    )
    for index in range(2)
  ]
  for number, batch in enumerate(whole):
    for name in ('views', 'labels', 'mask', 'video_ids'):
      rows = np.concatenate([part[number][name] for part in parts])
      np.testing.assert_array_equal(rows, batch[name])


def test_testing_can_be_repeated_and_left_early(prepared_datasets):
  batches = loader.test_loader(
    open_dataset(prepared_datasets), PREPROCESSING, batch_size=3, num_threads=2
  )
  early: Any = iter(batches)
  first = next(early)
  early.close()
  for _ in range(2):
    found = list(batches)
    assert len(found) == len(batches) == 4
    assert_same(found[0], first)


def test_broken_test_videos_are_listed_and_masked_never_replaced(
  prepared_datasets,
):
  batches = loader.test_loader(
    open_dataset(prepared_datasets, 'flawed'), PREPROCESSING, batch_size=4
  )
  seen, failed = [], []
  for batch in batches:
    names = np.array(batch['video_ids'])
    seen += list(names[batch['mask']])
    failed += batch['failed']
    for name, _ in batch['failed']:
      (row,) = np.flatnonzero(names == name)
      assert not batch['mask'][row]
      assert not batch['views'][row].any()
      assert batch['labels'][row] == int(name.removeprefix('train/')) % 3
  assert sorted(seen + [name for name, _ in failed]) == sorted(
    f'train/{index}' for index in range(11)
  )
  assert {name for name, _ in failed} == BROKEN
  for _, reason in failed:
    assert 'cannot be decoded' in reason
    assert '\n' not in reason


def test_damaged_test_records_are_listed(prepared_datasets, tmp_path):
  dataset = open_dataset(
    damaged(prepared_datasets, tmp_path), split='validation'
  )
  (batch,) = loader.test_loader(dataset, PREPROCESSING, batch_size=5)
  assert batch['mask'].sum() == 4
  ((name, reason),) = batch['failed']
  assert name == 'record 0'
  assert 'checksum' in reason


def test_several_labels_are_tested(prepared_datasets):
  dataset = open_dataset(prepared_datasets, 'levels_multi')
  last = list(loader.test_loader(dataset, PREPROCESSING, batch_size=8))[-1]
  assert last['labels'].shape == (8, 3)
  assert last['labels'].dtype == np.float32
  np.testing.assert_array_equal(last['mask'], np.arange(8) < 3)
  for row, name in zip(last['labels'], last['video_ids'], strict=True):
    count = int(name.removeprefix('train/')) % 4 if name else 0
    np.testing.assert_array_equal(row, np.arange(3) < count)


def test_the_short_side_may_be_larger_than_the_crop(prepared_datasets):
  dataset = open_dataset(prepared_datasets)
  (batch, *_) = loader.test_loader(
    dataset,
    views.Preprocessing(4, 2, 24),
    batch_size=2,
    short_side=28,
    num_threads=1,
  )
  example = dataset[1]
  expected = views.test_views(
    example.video, views.Preprocessing(4, 2, 24), short_side=28
  )
  np.testing.assert_array_equal(batch['views'][1], expected)


def test_classes_come_equally_often_if_they_are_to(prepared_datasets):
  dataset = open_dataset(prepared_datasets)
  labels = dataset.labels()
  np.testing.assert_array_equal(
    labels, [dataset[i].label for i in range(len(dataset))]
  )
  present = sorted(set(labels.tolist()))
  assert len({np.count_nonzero(labels == k) for k in present}) > 1
  order = loader._order(dataset, 7, class_balanced=True)
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
