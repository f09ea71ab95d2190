"""Batches are the same for any hosts and threads, and resume exactly."""

from __future__ import annotations

import json
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualformer_jax import errors
from dualformer_jax.input_pipeline import loader, transforms
from tests import conftest, stream_of_host
from tests.input_pipeline.loaders import (
  BROKEN,
  PREPROCESSING,
  assert_same,
  copy_with_damage,
  open_dataset,
  rows_of,
  take,
  wait_for_threads,
)


def test_batches_have_clips_labels_and_names(make_loader):
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


def test_several_labels_are_multi_hot(make_loader):
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


def streams(data_dir: pathlib.Path, *asked: list[dict[str, Any]]) -> list[Any]:
  """What hosts read that run at the same time, each a process.

  A host reads several streams, one after the other.
  """
  hosts = [
    subprocess.Popen(
      [
        sys.executable,
        '-m',
        'tests.stream_of_host',
        json.dumps([host_of(data_dir, stream) for stream in host]),
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


@pytest.mark.slow
def test_two_hosts_read_the_stream_of_one_and_resume_it(prepared_datasets):
  # As a mesh may have it: a device of each host in turn.
  left_rows, right_rows = {'rows': [0, 2]}, {'rows': [1, 3]}
  alone = stream_of_host.read(host_of(prepared_datasets, {'num_threads': 1}))
  go_on = {'state': alone[5]['state'], 'batches': 5}
  (first, left_resumed), (second, right_resumed) = streams(
    prepared_datasets,
    [left_rows, left_rows | go_on],
    [right_rows | {'num_threads': 5}, right_rows | go_on],
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
  assert left_resumed == first[6:]
  assert right_resumed == second[6:]
  go_on['state'] = second[5]['state']
  resumed = stream_of_host.read(host_of(prepared_datasets, go_on))
  assert resumed == alone[6:]


@pytest.mark.parametrize('hosts', [2, 4])
def test_hosts_read_their_rows_of_the_global_batches(make_loader, hosts):
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
def test_threads_and_prefetching_do_not_change_the_stream(make_loader, threads):
  expected = take(make_loader(), 6)
  found = take(make_loader(num_threads=threads, prefetch=threads), 6)
  for a, b in zip(found, expected, strict=True):
    assert_same(a, b)


@pytest.mark.slow
def test_processes_do_not_change_the_stream(make_loader, logged_warnings):
  options: dict[str, Any] = {
    'name': 'flawed',
    'repeats': 2,
    'rand_augment_ops': 2,
    'yuv420': True,
    'class_balanced': True,
  }
  expected = take(make_loader(**options), 7)
  of_threads = sorted(logged_warnings)
  logged_warnings.clear()
  iterator = make_loader(**options, num_processes=2)
  found = take(iterator, 5)
  state = iterator.get_state()
  iterator.close()
  assert multiprocessing.active_children() == []
  iterator.set_state(state)
  found += take(iterator, 2)
  for a, b in zip(found, expected, strict=True):
    assert_same(a, b)
  # Of the same videos, each once.
  assert len(of_threads) == len(BROKEN)
  assert [m.partition('(')[0] for m in sorted(logged_warnings)] == [
    m.partition('(')[0] for m in of_threads
  ]


@pytest.mark.slow
def test_killed_process_ends_the_run_and_signals_do_not(make_loader):
  iterator = make_loader(num_processes=2)
  take(iterator, 2)
  readers = multiprocessing.active_children()
  for reader in readers:
    for number in (signal.SIGINT, signal.SIGTERM):
      assert reader.pid is not None
      os.kill(reader.pid, number)
  take(iterator, 8)
  readers[0].kill()
  with pytest.raises(errors.UserError, match='process that reads videos was'):
    take(iterator, 8)
  iterator.close()
  assert multiprocessing.active_children() == []


@pytest.mark.parametrize('position', [0, 1, 6])
def test_interrupted_run_resumes_exactly(make_loader, position):
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


def test_set_state_rewinds_an_iterator(make_loader):
  iterator = make_loader(prefetch=2)
  take(iterator, 1)
  state = iterator.get_state()
  first = take(iterator, 3)
  iterator.set_state(state)
  for found, batch in zip(take(iterator, 3), first, strict=True):
    assert_same(found, batch)


def test_run_resumes_with_another_number_of_hosts(make_loader):
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


def test_state_of_another_run_raises(make_loader):
  state = make_loader().get_state()
  with pytest.raises(errors.UserError, match='seed is 8, .* began with 7'):
    make_loader(seed=8).set_state(state)
  with pytest.raises(errors.UserError, match='not the dataset that this run'):
    make_loader('flawed').set_state(state)
  for malformed in ({}, state | {'position': 'x'}, {'position': 4}):
    with pytest.raises(errors.UserError, match='malformed'):
      make_loader().set_state(malformed)


def test_later_batches_do_not_change_earlier_ones(make_loader):
  iterator = make_loader()
  kept, copies = [], []
  # A part of an array, and what JAX may not copy, keep the memory as well.
  for keep in (lambda x: x, lambda x: x[1:, ::2], jax.device_put, jnp.asarray):
    clips = next(iterator)['clips']
    copies.append(np.array(keep(clips)))
    kept.append(keep(clips))
  del clips
  take(iterator, 8)
  for clips, copy in zip(kept, copies, strict=True):
    np.testing.assert_array_equal(clips, copy)


def test_memory_of_batches_is_used_again(make_loader):
  iterator = make_loader(prefetch=3)
  places = set()
  for _ in range(20):
    places.add(next(iterator)['clips'].ctypes.data)
  assert len(places) <= 5  # one in use, one being read, three ahead


def test_threads_read_in_parallel_and_only_as_far_ahead_as_asked(
  make_loader, monkeypatch
):
  lock, running, most, begun = threading.Lock(), 0, 0, 0
  four = threading.Barrier(4)
  train_clips = transforms.train_clips

  def slow(*args: Any, **kwargs: Any) -> Any:
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
    return train_clips(*args, **kwargs)

  wait_for_threads()  # Those of other tests.
  monkeypatch.setattr(transforms, 'train_clips', slow)
  iterator = make_loader(num_threads=4, prefetch=2)
  next(iterator)
  time.sleep(1)
  assert most == 4
  # The batch taken, two ahead, one stacked and one that waits to be.
  assert 4 * 3 <= begun <= 4 * 5


def test_close_ends_all_threads(make_loader, prepared_datasets):
  wait_for_threads()
  iterator = make_loader(num_threads=4, prefetch=2)
  next(iterator)
  assert any('reader' in thread.name for thread in threading.enumerate())
  iterator.close()
  assert wait_for_threads() == []
  dataset = open_dataset(prepared_datasets)
  batches = loader.EvalLoader(dataset, PREPROCESSING, 2, range(2))
  for _ in batches:
    break
  assert wait_for_threads() == []


@pytest.mark.slow
def test_program_can_end_without_closing_the_loader(prepared_datasets):
  program = """
import sys
from dualformer_jax.input_pipeline import loader, transforms
from dualformer_jax.input_pipeline.dataset import PreparedDataset
iterator = loader.TrainLoader(
  PreparedDataset('levels', 'train', sys.argv[1]),
  transforms.Preprocessing(4, 2, 24),
  loader.TrainOptions(seed=0),
  4, range(4),
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


@pytest.mark.parametrize('hosts', [1, 2, 3])
def test_eval_has_every_video_once_over_all_hosts(prepared_datasets, hosts):
  dataset = open_dataset(prepared_datasets)
  parts = [
    loader.EvalLoader(
      dataset,
      PREPROCESSING,
      6,
      rows_of(6, index, hosts),
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


def test_eval_hosts_read_their_rows_of_the_global_batches(prepared_datasets):
  dataset = open_dataset(prepared_datasets)
  whole = list(loader.EvalLoader(dataset, PREPROCESSING, 6, range(6)))
  parts = [
    list(
      loader.EvalLoader(
        dataset,
        PREPROCESSING,
        6,
        rows_of(6, index, 2),
      )
    )
    for index in range(2)
  ]
  for number, batch in enumerate(whole):
    for name in ('views', 'labels', 'mask', 'video_ids'):
      rows = np.concatenate([part[number][name] for part in parts])
      np.testing.assert_array_equal(rows, batch[name])


def test_eval_batches_can_be_iterated_again(prepared_datasets):
  batches = loader.EvalLoader(
    open_dataset(prepared_datasets),
    PREPROCESSING,
    3,
    range(3),
    num_threads=2,
  )
  early: Any = iter(batches)
  first = next(early)
  early.close()
  for _ in range(2):
    found = list(batches)
    assert len(found) == len(batches) == 4
    assert_same(found[0], first)


def test_eval_masks_and_lists_broken_videos(
  prepared_datasets,
):
  batches = loader.EvalLoader(
    open_dataset(prepared_datasets, 'flawed'),
    PREPROCESSING,
    4,
    range(4),
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


def test_eval_lists_damaged_records(prepared_datasets, tmp_path):
  dataset = open_dataset(
    copy_with_damage(prepared_datasets, tmp_path), split='validation'
  )
  (batch,) = loader.EvalLoader(dataset, PREPROCESSING, 5, range(5))
  assert batch['mask'].sum() == 4
  ((name, reason),) = batch['failed']
  assert name == 'record 0'
  assert 'checksum' in reason


def test_eval_labels_are_multi_hot(prepared_datasets):
  dataset = open_dataset(prepared_datasets, 'levels_multi')
  last = list(loader.EvalLoader(dataset, PREPROCESSING, 8, range(8)))[-1]
  assert last['labels'].shape == (8, 3)
  assert last['labels'].dtype == np.float32
  np.testing.assert_array_equal(last['mask'], np.arange(8) < 3)
  for row, name in zip(last['labels'], last['video_ids'], strict=True):
    count = int(name.removeprefix('train/')) % 4 if name else 0
    np.testing.assert_array_equal(row, np.arange(3) < count)


def test_eval_short_side_can_exceed_the_crop(prepared_datasets):
  dataset = open_dataset(prepared_datasets)
  (batch, *_) = loader.EvalLoader(
    dataset,
    transforms.Preprocessing(4, 2, 24),
    2,
    range(2),
    short_side=28,
    num_threads=1,
  )
  example = dataset[1]
  expected = transforms.eval_views(
    example.video, transforms.Preprocessing(4, 2, 24), short_side=28
  )
  np.testing.assert_array_equal(batch['views'][1], expected)
