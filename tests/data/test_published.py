"""Builders of published datasets read the files as published."""

from collections.abc import Mapping
import importlib
import pathlib
import re

import cv2
import numpy as np
import pytest
from tensorflow_datasets.core import dataset_metadata

from dualformer_jax import errors
from dualformer_jax.input_pipeline import video_writer
from dualformer_jax.input_pipeline.dataset import PreparedDataset
from dualformer_jax.input_pipeline.preparing import (
  annotation,
  kinetics,
)
from tests import tfds_command
from tests.data import published_cases
from tests.data.published_cases import CASES, DATA, Case, kinetics_case
from tests.input_pipeline import videos
from tests.input_pipeline.preparing import building
from tests.input_pipeline.preparing.building import build, in_process, write

_ = in_process  # A fixture.
FPS = 5
FRAMES = 20
NAMES = tuple(dict.fromkeys(case.name.split('/')[0] for case in CASES))


def frames(number: int) -> np.ndarray:
  """Frames of 32x32 pixels; the brightness identifies video and frame."""
  levels = 20 + 10 * (number % 8) + 5 * np.arange(FRAMES)
  levels = levels[:, None, None, None].astype(np.uint8)
  return np.broadcast_to(levels, (FRAMES, 32, 32, 3))


def write_texts(case: Case, folder: pathlib.Path) -> pathlib.Path:
  for name, text in case.texts.items():
    write(folder / name, text.encode())
  return folder


def write_case(case: Case, folder: pathlib.Path) -> pathlib.Path:
  write_texts(case, folder)
  for number, name in enumerate(case.videos):
    if not name.endswith('.jpg'):
      write(folder / name, video_writer.encode_mp4(frames(number), fps=FPS))
      continue
    for index, frame in enumerate(frames(number), 1):
      path = folder / name.replace('00001', f'{index:05d}')
      write(path, cv2.imencode('.jpg', frame)[1].tobytes())
  for name in case.damaged:
    write(folder / name, b'damaged')
  return folder


def find_case(name: str) -> Case:
  return next(case for case in CASES if case.name.split('/')[0] == name)


def make_builder(name: str, out: pathlib.Path) -> annotation.AnnotatedBuilder:
  name, _, config = name.partition('/')
  module = importlib.import_module(f'data.{name}.{name}_dataset_builder')
  return module.Builder(data_dir=out, config=config or None)


def check(case: Case, folder: pathlib.Path) -> None:
  """Compares a prepared dataset with the expected one."""
  report = building.read_report(folder)
  assert report['missing'] == case.missing
  assert report['missing_videos'] == dict.fromkeys(case.missing, 1)
  missing = (folder / 'missing.txt').read_text('utf-8').splitlines()
  assert [line.split()[0] for line in missing] == list(case.missing)
  undecodable = sorted(video['video_id'] for video in report['undecodable'])
  assert undecodable == sorted(case.undecodable)
  assert set(report['splits']) == set(case.labels)
  for split, expected in case.labels.items():
    dataset = PreparedDataset(str(folder), split, '')
    if isinstance(case.classes, Mapping):
      assert {n: dataset.class_names[n] for n in case.classes} == case.classes
      assert len(dataset.class_names) == max(case.classes) + 1
    else:
      assert dataset.class_names == tuple(case.classes)
    examples = building.read_split(folder, split)
    assert {name: e.label for name, e in examples.items()} == expected
    fps = 12 if case.videos[0].endswith('.jpg') else FPS
    for example in examples.values():
      assert videos.probe(example.video).fps == fps


@pytest.mark.parametrize('case', CASES, ids=lambda case: case.name)
def test_published_dataset_is_prepared(case, in_process, tmp_path):
  dataset = make_builder(case.name, tmp_path / 'out')
  build(dataset, write_case(case, tmp_path / 'videos'))
  check(case, pathlib.Path(dataset.data_path))


def test_clip_with_two_labels_is_reported_with_both(in_process, tmp_path):
  case = find_case('kinetics400')
  folder = write_case(case, tmp_path / 'videos')
  path = folder / 'annotations' / 'train.csv'
  again = '-3B32lodo2M,9,19,train,0\n'
  path.write_text(
    path.read_text('utf-8')
    + f'zumba,{again}'
    + f'passing American football (in game),{again}',
    'utf-8',
  )
  dataset = make_builder('kinetics400', tmp_path / 'out')
  report = build(dataset, folder)
  name = '-3B32lodo2M_000009_000019 of train is listed'
  kept = 'passing American football (in game)'
  assert report['notes'] == [
    f"{name} with the labels '{kept}' and 'zumba'; the first is kept",
    f'{name} more than once',
  ]
  for note in report['notes']:
    assert note in (pathlib.Path(dataset.data_path) / 'summary.txt').read_text()
  check(case, pathlib.Path(dataset.data_path))


def test_segments_are_cut_at_their_times(in_process, tmp_path):
  case = published_cases.ACTIVITYNET_SEGMENTS
  dataset = make_builder(case.name, tmp_path / 'out')
  build(dataset, write_case(case, tmp_path / 'videos'))
  levels = {
    name: [
      round(float(frame.mean()) / 5)
      for frame in videos.decode_all(example.video)
    ]
    for name, example in building.read_split(dataset.data_path, 'train').items()
  }
  # At five frames per second: from 0.6 s to 2 s, and from there to the end.
  first = frames(1)[0].mean() // 5
  assert levels == {
    'v__o-xPK-8AD8/0': [first + n for n in range(3, 10)],
    'v__o-xPK-8AD8/1': [first + n for n in range(10, 20)],
  }


@pytest.mark.slow
def test_command_builds_a_dataset_whose_name_tfds_uses_as_well(tmp_path):
  case = published_cases.ucf101_case(1)
  done = tfds_command.tfds_build(
    DATA / 'ucf101',
    f'--manual_dir={write_case(case, tmp_path / "videos")}',
    f'--data_dir={tmp_path / "out"}',
    '--config=split1',
    cwd=tmp_path,
  )
  assert done.returncode == 0, done.stderr
  assert 'Traceback' not in done.stderr
  check(case, tmp_path / 'out' / 'ucf101' / 'split1' / '1.0.0')


@pytest.mark.parametrize('number', [400, 600, 700])
def test_labels_of_kinetics_are_sorted(number):
  names = (DATA / f'kinetics{number}' / 'labels.txt').read_text().splitlines()
  assert len(set(names)) == number
  assert names == sorted(names, key=lambda name: name.replace(' ', '_'))
  assert len({kinetics.normalize_label(name) for name in names}) == number
  assert (names[0], names[-1]) == ('abseiling', 'zumba')


def test_test_list_of_kinetics_with_labels_is_a_split(tmp_path):
  folder = write_texts(kinetics_case(400, 0, 0), tmp_path)
  (folder / 'annotations' / 'test.csv').write_text(
    'label,youtube_id,time_start,time_end,split,is_cc\n'
    'zumba,--6q_33gNew,132,142,test,0\n'
  )
  listing = make_builder('kinetics400', tmp_path).read_annotations(folder)
  assert [video for video in listing.videos if video.split == 'test'] == [
    annotation.ListedVideo('--6q_33gNew_000132_000142', ('zumba',), 'test')
  ]


@pytest.mark.parametrize('number', [400, 600, 700])
def test_lists_of_kinetics_can_have_other_names(number, tmp_path):
  builder = make_builder(f'kinetics{number}', tmp_path)
  folder = write_texts(kinetics_case(number, 0, 0), tmp_path)
  expected = builder.read_annotations(folder).videos
  assert len(expected) == 5
  for form in ('kinetics_{}.csv', f'kinetics-{number}_{{}}.csv', '{}.txt'):
    names = {'train': 'train', 'validate': 'val', 'val': 'val', 'test': 'test'}
    for path in sorted((folder / 'annotations').iterdir()):
      word = path.stem.replace('-', '_').split('_')[-1]
      path.rename(path.with_name(form.format(names[word])))
    assert builder.read_annotations(folder).videos == expected


def test_long_videos_of_omnisource_can_be_uncut(tmp_path):
  folder = write_texts(published_cases.OMNISOURCE_RAW, tmp_path)
  builder = make_builder('omnisource/kinetics_raw', tmp_path)
  videos = builder.read_annotations(folder).videos
  expected = [
    ('pref_D/D32_1gwq35E', 'abseiling', (0.0, 10.0), 'part_0'),
    ('pref_D/D32_1gwq35E', 'abseiling', (20.0, 30.0), 'part_2'),
    ('pref_-/-G-5CJ0JkKY', 'arm_wrestling', (20.0, 30.0), 'part_2'),
  ]
  assert videos[:3] == [
    annotation.ListedVideo(
      name, (label,), 'train', times, f'{name}/{part}', in_folder=True
    )
    for name, label, times, part in expected
  ]
  # The same as a text file.
  path = folder / 'annotations/kinetics_raw_200/slowonly_8x8_kinetics_raw_200'
  path.with_suffix('.json').unlink()
  path.with_suffix('.txt').write_text(
    'pref_D/D32_1gwq35E 2 10 0 2\npref_-/-G-5CJ0JkKY 1 10 2\n'
    'pref_T/T4h1bvOd9DA 0 10\n'
  )
  assert builder.read_annotations(folder).videos == videos


def test_lists_of_omnisource_without_labels_use_those_of_kinetics(tmp_path):
  folder = write_texts(published_cases.OMNISOURCE, tmp_path)
  lists = folder / 'annotations' / 'kinetics_200'
  (lists / 'k200_train.txt').write_text('0074cdXclLU.mp4\n')
  builder = make_builder('omnisource', tmp_path)
  with pytest.raises(errors.UserError, match='train.csv'):
    builder.read_annotations(folder)
  header = 'label,youtube_id,time_start,time_end,split\n'
  (folder / 'train.csv').write_text(
    f'{header}arm wrestling,0074cdXclLU,1,11,train\nyoga,x,1,11,train\n'
  )
  (folder / 'val.csv').write_text(header)
  video = builder.read_annotations(folder).videos[0]
  assert (video.name, video.labels) == ('0074cdXclLU', ('arm_wrestling',))
  (lists / 'k200_train.txt').write_text('0074cdXclLV.mp4\n')
  with pytest.raises(errors.UserError, match='k200_train.txt.*0074cdXclLV'):
    builder.read_annotations(folder)


MALFORMED = (
  ('kinetics400', 'annotations/train.csv', 'label,youtube_id\na,b\n'),
  ('kinetics400', 'annotations/train.csv', ''),
  (
    'kinetics400',
    'annotations/val.csv',
    'label,youtube_id,time_start,time_end,split\nzumba,x\n',
  ),
  (
    'kinetics400',
    'annotations/val.csv',
    'label,youtube_id,time_start,time_end,split\nchess,x,0,10,val\n',
  ),
  ('ucf101/split3', 'ucfTrainTestlist/classInd.txt', 'ApplyLipstick\n'),
  ('ucf101/split3', 'ucfTrainTestlist/classInd.txt', '1 a\n3 b\n'),
  ('ucf101/split3', 'ucfTrainTestlist/trainlist03.txt', 'Chess/v.avi 1\n'),
  ('hmdb51/split2', 'splits/kick_test_split2.txt', 'a.avi\n'),
  ('hmdb51/split2', 'splits/kick_test_split2.txt', 'a.avi 3\n'),
  ('diving48', 'Diving48_vocab.json', '[["Back"'),
  ('diving48', 'Diving48_V2_test.json', '[{"vid_name": "x", "label": 3}]'),
  ('diving48', 'Diving48_V2_test.json', '[{"vid_name": "x", "label": -1}]'),
  ('diving48', 'Diving48_V2_train.json', '{"vid_name": "x"}'),
  ('something_something_v1', 'something-something-v1-train.csv', '1,Holding\n'),
  (
    'something_something_v2',
    'labels/something-something-v2-train.json',
    '[{"id": "1"}]',
  ),
  (
    'something_something_v2',
    'labels/something-something-v2-labels.json',
    '["Holding something"]',
  ),
  ('jester', 'jester-v1-validation.csv', '9223;Waving\n'),
  ('moments_in_time', 'moments_categories.txt', 'clapping\n'),
  ('moments_in_time', 'trainingSet.csv', 'waving/x.mp4,waving,3,0\n'),
  ('multi_moments_in_time', 'validationSet.csv', 'raining/x.mp4\n'),
  ('multi_moments_in_time', 'validationSet.csv', 'raining/x.mp4,3\n'),
  ('activitynet', 'activity_net.v1-3.min.json', '{"version": 1}'),
  (
    'activitynet/segments',
    'activity_net.v1-3.min.json',
    '{"database": {"x": {"subset": "training", "annotations":'
    ' [{"label": "BMX", "segment": [1]}]}}}',
  ),
  ('hvu', 'HVU_Tags_Categories_V1.0.csv', 'Tag\nhouse\n'),
  ('hvu/event', 'HVU_Tags_Categories_V1.0.csv', 'Tag,Category\na,action\n'),
  (
    'hvu',
    'HVU_Val_V1.0.csv',
    'Tags,youtube_id,time_start,time_end\nhouse|moon,x,1,2\n',
  ),
  ('omnisource', 'annotations/kinetics_200/k200_val.txt', 'x.mp4 3\n'),
  ('omnisource', 'annotations/kinetics_200/k200_val.txt', 'x.mp4 zumba\n'),
)


@pytest.mark.parametrize(('name', 'file', 'text'), MALFORMED)
def test_malformed_file_is_named_in_one_line(name, file, text, tmp_path):
  folder = write_texts(find_case(name.split('/')[0]), tmp_path / 'videos')
  builder = make_builder(name, tmp_path / 'out')
  builder.read_annotations(folder)
  (folder / file).write_text(text)
  with pytest.raises(errors.UserError) as caught:
    builder.read_annotations(folder)
  assert str(caught.value).startswith(f'{folder / file}: ')
  assert '\n' not in str(caught.value)


# Not needed, or not in the default configuration.
OPTIONAL = (
  'annotations/test.csv',
  'something-something-v1-test.csv',
  'labels/something-something-v2-test.json',
  'jester-v1-test.csv',
  'annotations/kinetics_raw_200/slowonly_8x8_kinetics_raw_200.json',
  'annotations/insvideo_200/slowonly_8x8_insvideo_200_wodup.txt',
)


@pytest.mark.parametrize('name', NAMES)
def test_missing_file_is_named(name, tmp_path):
  case = find_case(name)
  texts = case.texts
  if name == 'hmdb51':  # Each split has separate lists; a few are enough.
    texts = [file for file in texts if 'ck_' in file and 'split2' in file]
    assert texts
  builder = make_builder(case.name, tmp_path / 'out')
  folder = write_texts(case, tmp_path / 'videos')
  expected = builder.read_annotations(folder).videos
  for file in texts:
    content = (folder / file).read_bytes()
    (folder / file).unlink()
    if file in OPTIONAL:
      assert builder.read_annotations(folder).videos == expected
    else:
      with pytest.raises(errors.UserError, match='not found') as caught:
        builder.read_annotations(folder)
      assert str(caught.value).startswith(f'{folder}: annotation file ')
      assert pathlib.Path(file).name in str(caught.value)
    (folder / file).write_bytes(content)


@pytest.mark.parametrize('name', NAMES)
def test_readme_names_configurations_and_files(name, tmp_path):
  readme = (DATA / name / 'README.md').read_text('utf-8')
  assert f'tfds build data/{name} --manual_dir=' in readme
  builder = make_builder(name, tmp_path)
  for config in set(builder.CONFIGS) - {'reencoded'}:
    words = f'=?{re.sub("_(verbatim|jpeg)$", "", config)}[` ]'
    assert re.search(words, readme), config
  for case in CASES:
    if case.name.split('/')[0] == name:
      for file in map(pathlib.Path, case.texts):
        # The README names the files of split 1, and of one class.
        word = re.sub(r'\d\.txt$', '1.txt', file.name)
        assert re.sub('^.*_test_split', '_test_split', word) in readme
  metadata = dataset_metadata.load(type(builder).pkg_dir_path)
  assert metadata.citation.startswith('@')
  assert set(metadata.tags) <= set(dataset_metadata.valid_tags())


def test_every_builder_is_tested_and_listed():
  folders = {path.parent.name for path in DATA.glob('*/*_dataset_builder.py')}
  assert folders - set(NAMES) == {'motion', 'video_folder'}
  listed = (tfds_command.REPOSITORY / 'README.md').read_text('utf-8')
  for name in NAMES:
    assert f'](data/{name}/README.md)' in listed
