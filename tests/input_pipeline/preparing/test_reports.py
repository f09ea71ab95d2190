"""The report does not depend on the order of the videos."""

import json

from dualformer_jax.input_pipeline.preparing import reports, video_store


def entry(split, name, label, digest, signature=''):
  stored = video_store.StoredVideo('', digest, 100, signature)
  return reports.Entry(split, name, (label,), stored)


ENTRIES = [
  entry('train', 'a', 0, 'A'),
  entry('train', 'b', 1, 'B', 'f0' * 128),
  entry('validation', 'c', 1, 'A'),
  entry('validation', 'd', 1, 'D', 'f0' * 127 + 'ff'),
  entry('validation', 'e', 0, 'E', '0f' * 128),
]


def make(entries=ENTRIES, **findings):
  return reports.make_report('name/1.0.0', ['x', 'y'], entries, findings)


def test_report_counts_videos_and_lists_near_duplicates():
  report = make()
  assert make(ENTRIES[::-1]) == report
  assert report['splits'] == {
    'train': {'videos': 2, 'bytes': 200, 'classes': {'x': 1, 'y': 1}},
    'validation': {'videos': 3, 'bytes': 300, 'classes': {'x': 1, 'y': 2}},
  }
  assert report['near_copies'] == [
    {'splits': ['train', 'validation'], 'videos': [['a', 'c'], ['b', 'd']]}
  ]


def test_fingerprint_depends_on_split_name_label_and_content():
  fingerprints = {make()['fingerprint']}
  for changed in (
    entry('test', 'a', 0, 'A'),
    entry('train', 'z', 0, 'A'),
    entry('train', 'a', 1, 'A'),
    entry('train', 'a', 0, 'Z'),
  ):
    fingerprints.add(make([changed, *ENTRIES[1:]])['fingerprint'])
  assert len(fingerprints) == 5


def test_summary_of_one_video_is_singular(tmp_path):
  entries = [entry('train', 'a', 0, 'A'), entry('test', 'b', 0, 'A')]
  summary = reports.write(tmp_path, make(entries, found=1, undecodable=[]))
  for line in (
    'train: 1 video, ',
    '0 of 1 video cannot be decoded',
    'near-duplicates of videos of train: 1 video of test; scores on test',
  ):
    assert f'\n{line}' in summary
  assert '1 videos' not in summary


def test_summary_lists_what_is_missing_and_undecodable(tmp_path):
  bad = [{'video_id': f'bad{i}', 'reason': 'is empty'} for i in range(25)]
  report = make(
    found=30,
    undecodable=bad,
    listed={'train': 3, 'validation': 3},
    missing={'train': {'x': 1}},
    missing_videos={'train': 1},
    notes=['caf\udce9'],
  )
  summary = reports.write(tmp_path, report)
  assert report['fingerprint'] in summary
  assert '1 of 3 listed are missing' in summary
  assert '25 of 30 videos cannot be decoded' in summary
  assert 'bad19: is empty' in summary
  assert 'bad20' not in summary
  assert '5 more' in summary
  assert 'd duplicates b' in summary
  assert (tmp_path / 'summary.txt').read_text('utf-8').endswith('caf\\udce9\n')
  written = json.loads((tmp_path / 'report.json').read_text('utf-8'))
  assert written['splits'] == report['splits']
