"""The definitions of datasets read what the publishers ship."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import importlib
import json
import pathlib
import re
from typing import Any

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core import dataset_metadata

from dualformer_jax import errors
from dualformer_jax.input_pipeline import decoding, records
import kinetics
import published
from tests import tfds_command

DATA = tfds_command.REPOSITORY / 'data'
FPS = 5
FRAMES = 20


@dataclasses.dataclass
class Case:
  """A dataset as it lies on a disk, and what must be made of it.

  Attributes:
    name: of the dataset, with its configuration if that is not the default.
    texts: the annotation files; lines as in those published.
    videos: files, or frames of folders (1.jpg: the first of them).
    broken: the same, but not to be decoded.
    classes: their names, or how many there are and some of them.
    labels: of each good video, by split.
    missing: how many are listed, but not there, by split and class; one video
      of each split.
    undecodable: the names of the broken ones.
  """

  name: str
  texts: Mapping[str, str]
  videos: Sequence[str]
  broken: Sequence[str]
  classes: Sequence[str] | Mapping[int, str]
  labels: Mapping[str, Mapping[str, int | tuple[int, ...]]]
  missing: Mapping[str, Mapping[str, int]]
  undecodable: Sequence[str]


def kinetics_case(number: int, head: int, football: int) -> Case:
  header = 'label,youtube_id,time_start,time_end,split'
  more = ',is_cc' if number == 400 else ''
  rest = ',0' if number == 400 else ''
  val = 'validate' if number == 700 else 'val'
  return Case(
    f'kinetics{number}',
    {
      'annotations/train.csv': (
        f'{header}{more}\n'
        f'abseiling,_4YTwq0-73Y,4,14,train{rest}\n'
        f'"massaging person\'s head",a_b_c_d_e_f,90.0,100.0,train{rest}\n'
        f'passing_American_football_(in_game),-3B32lodo2M,9,19,train{rest}\n'
      ),
      f'annotations/{val}.csv': (
        f'{header}{more}\r\n'
        f'zumba,0wR5jVB-WPk,417,427,val{rest}\r\n'
        f'"""air drumming""",yq_M1PMw2hY,38,48,val{rest}\r\n'
      ),
      'annotations/test.csv': (
        'youtube_id,time_start,time_end,split\n--6q_33gNew,132,142,test\n'
      ),
    },
    [
      "videos_train/massaging person's head/a_b_c_d_e_f_000090_000100.mkv",
      'videos_train/x/-3B32lodo2M_000009_000019.mp4',
      'videos_val/0wR5jVB-WPk_000417_000427.mp4',
      'videos_val/NeverListed_000001_000011.mp4',
      'videos_test/--6q_33gNew_000132_000142.mp4',
    ],
    ['videos_train/abseiling/_4YTwq0-73Y_000004_000014.mp4'],
    {
      0: 'abseiling',
      head: "massaging person's head",
      football: 'passing American football (in game)',
      number - 1: 'zumba',
    },
    {
      'train': {
        'a_b_c_d_e_f_000090_000100': head,
        '-3B32lodo2M_000009_000019': football,
      },
      'validation': {'0wR5jVB-WPk_000417_000427': number - 1},
    },
    {'validation': {'air drumming': 1}},
    ['_4YTwq0-73Y_000004_000014'],
  )


def ucf101_case(split: int) -> Case:
  case = Case(
    f'ucf101/split{split}',
    {
      # From 1 on; with Windows' line ends.
      'ucfTrainTestlist/classInd.txt': (
        '1 ApplyLipstick\r\n2 ApplyEyeMakeup\r\n3 HandstandPushups\r\n'
      ),
      f'ucfTrainTestlist/trainlist0{split}.txt': (
        'ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 2\r\n'
        'HandstandPushups/v_HandStandPushups_g01_c01.avi 3\r\n'
        'ApplyLipstick/v_ApplyLipstick_g08_c01.avi 1\r\n'
      ),
      f'ucfTrainTestlist/testlist0{split}.txt': (
        'ApplyLipstick/v_ApplyLipstick_g01_c01.avi\r\n'
        'ApplyLipstick/v_ApplyLipstick_g01_c02.avi\r\n'
      ),
    },
    [
      'UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi',
      'UCF-101/HandstandPushups/v_HandStandPushups_g01_c01.avi',
      'UCF-101/ApplyLipstick/v_ApplyLipstick_g01_c01.avi',
    ],
    ['UCF-101/ApplyLipstick/v_ApplyLipstick_g08_c01.avi'],
    ['ApplyLipstick', 'ApplyEyeMakeup', 'HandstandPushups'],
    {
      'train': {
        'ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01': 1,
        'HandstandPushups/v_HandStandPushups_g01_c01': 2,
      },
      'test': {'ApplyLipstick/v_ApplyLipstick_g01_c01': 0},
    },
    {'test': {'ApplyLipstick': 1}},
    ['ApplyLipstick/v_ApplyLipstick_g08_c01'],
  )
  return case


# Every class has a list, if only of videos that are not used.
HMDB51_LISTS = dict.fromkeys(
  (DATA / 'hmdb51' / 'labels.txt').read_text().splitlines(),
  'Unused_walk_u_nm_np1_ba_goo_1.avi 0 \n',
)
HMDB51 = Case(
  'hmdb51/split2',
  {
    f'splits/{name}_test_split{split}.txt': text
    for split in (1, 2)
    for name, text in {
      **HMDB51_LISTS,
      'kick': 'winKen_kick_u_cm_np1_ri_bad_1.avi 2 \n',
      'kick_ball': f'April_09_kick_ball_u_nm_np1_ba_goo_0.avi {split} \n'
      '#20_Rhythm_kick_ball_u_nm_np1_fr_goo_0.avi 1 \n',
      'brush_hair': 'atrium_brush_hair_u_nm_np1_ba_goo_0.avi 1 \n'
      'Unused_brush_hair_u_nm_np1_ba_goo_1.avi 0 \n'
      'Broken_brush_hair_u_nm_np1_ba_goo_2.avi 2 \n',
    }.items()
  },
  [
    'kick/winKen_kick_u_cm_np1_ri_bad_1.avi',
    'kick_ball/April_09_kick_ball_u_nm_np1_ba_goo_0.avi',
    'kick_ball/#20_Rhythm_kick_ball_u_nm_np1_fr_goo_0.avi',
    'brush_hair/Unused_brush_hair_u_nm_np1_ba_goo_1.avi',
  ],
  ['brush_hair/Broken_brush_hair_u_nm_np1_ba_goo_2.avi'],
  {0: 'brush_hair', 20: 'kick', 21: 'kick_ball', 50: 'wave'},
  {
    'train': {'kick_ball/#20_Rhythm_kick_ball_u_nm_np1_fr_goo_0': 21},
    'test': {
      'kick/winKen_kick_u_cm_np1_ri_bad_1': 20,
      'kick_ball/April_09_kick_ball_u_nm_np1_ba_goo_0': 21,
    },
  },
  {'train': {'brush_hair': 1}},
  ['brush_hair/Broken_brush_hair_u_nm_np1_ba_goo_2'],
)

DIVING48 = Case(
  'diving48',
  {
    'Diving48_vocab.json': json.dumps(
      [
        ['Back', '15som', '05Twis', 'FREE'],
        ['Back', '15som', '15Twis', 'FREE'],
        ['Back', '15som', 'NoTwis', 'PIKE'],
      ]
    ),
    'Diving48_V2_train.json': json.dumps(
      [
        {'vid_name': name, 'label': label, 'start_frame': 0, 'end_frame': 48}
        for name, label in (('-mmq0PT-u8k_00155', 2), ('0vPKGnQu5Zw_00000', 0))
      ]
    ),
    'Diving48_V2_test.json': json.dumps(
      [
        {'vid_name': name, 'label': label, 'start_frame': 0, 'end_frame': 52}
        for name, label in (('1uLhZUSROnM_00009', 1), ('zYdcxjTKaqE_00026', 0))
      ]
    ),
  },
  ['rgb/-mmq0PT-u8k_00155.mp4', 'rgb/1uLhZUSROnM_00009.mp4'],
  ['rgb/zYdcxjTKaqE_00026.mp4'],
  [
    'Back+15som+05Twis+FREE',
    'Back+15som+15Twis+FREE',
    'Back+15som+NoTwis+PIKE',
  ],
  {'train': {'-mmq0PT-u8k_00155': 2}, 'test': {'1uLhZUSROnM_00009': 1}},
  {'train': {'Back+15som+05Twis+FREE': 1}},
  ['zYdcxjTKaqE_00026'],
)

SOMETHING_V1 = Case(
  'something_something_v1',
  {
    'something-something-v1-labels.csv': (
      'Holding something\nTurning something upside down\n'
      'Approaching something with your camera\n'
    ),
    'something-something-v1-train.csv': (
      '100218;Approaching something with your camera\n'
      '24413;Turning something upside down\n'
      '96612;Holding something\n'
    ),
    'something-something-v1-validation.csv': '74225;Holding something\n'
    '116154;Turning something upside down\n',
    'something-something-v1-test.csv': '1420\n',
  },
  [
    '20bn-something-something-v1/100218/00001.jpg',
    '20bn-something-something-v1/74225/img_00001.jpg',
    '20bn-something-something-v1/1420/00001.jpg',
  ],
  ['20bn-something-something-v1/24413/00001.jpg'],
  [
    'Holding something',
    'Turning something upside down',
    'Approaching something with your camera',
  ],
  {'train': {'100218': 2}, 'validation': {'74225': 0}},
  {
    'train': {'Holding something': 1},
    'validation': {'Turning something upside down': 1},
  },
  ['24413'],
)

JESTER = Case(
  'jester',
  {
    'jester-v1-labels.csv': 'Swiping Left\nDrumming Fingers\nStop Sign\n',
    'jester-v1-train.csv': '34870;Drumming Fingers\n56557;Swiping Left\n',
    'jester-v1-validation.csv': '9223;Stop Sign\n42920;Stop Sign\n',
    'jester-v1-test.csv': '1420\n',
  },
  ['20bn-jester-v1/34870/00001.jpg', '20bn-jester-v1/9223/img_00001.jpg'],
  ['20bn-jester-v1/42920/00001.jpg'],
  ['Swiping Left', 'Drumming Fingers', 'Stop Sign'],
  {'train': {'34870': 1}, 'validation': {'9223': 2}},
  {'train': {'Swiping Left': 1}},
  ['42920'],
)


def something_v2_lines(*videos: tuple[str, str]) -> str:
  return json.dumps(
    [
      {
        'id': name,
        'label': template.replace('[something]', 'a cup'),
        'template': template,
        'placeholders': ['a cup'],
      }
      for name, template in videos
    ]
  )


SOMETHING_V2 = Case(
  'something_something_v2',
  {
    'labels/something-something-v2-labels.json': json.dumps(
      {
        'Approaching something with your camera': '1',
        'Holding something next to something': '0',
      }
    ),
    'labels/something-something-v2-train.json': something_v2_lines(
      ('78687', 'Holding [something] next to [something]'),
      ('42326', 'Approaching [something] with your camera'),
    ),
    'labels/something-something-v2-validation.json': something_v2_lines(
      ('74225', 'Approaching [something] with your camera'),
      ('116154', 'Approaching [something] with your camera'),
    ),
    'labels/something-something-v2-test.json': '[{"id":"1420"}]',
  },
  ['20bn-something-something-v2/78687.webm', '74225.webm', '1420.webm'],
  ['20bn-something-something-v2/116154.webm'],
  [
    'Holding something next to something',
    'Approaching something with your camera',
  ],
  {'train': {'78687': 0}, 'validation': {'74225': 1}},
  {'train': {'Approaching something with your camera': 1}},
  ['116154'],
)

MOMENTS = Case(
  'moments_in_time',
  {
    'moments_categories.txt': (
      'clapping,0\nadult+female+singing,2\nblocking,1\n'
    ),
    'trainingSet.csv': (
      'clapping/yt-zxQfALnTdfc_56.mp4,clapping,3,0\n'
      'blocking/yt-zxQfALnTdfc_56.mp4,blocking,4,1\n'
      'adult+female+singing/0P3XG_vf91c_35.mp4,adult+female+singing,3,1\n'
    ),
    'validationSet.csv': (
      'blocking/getty-karate-video-id635808620_4.mp4,blocking,3,0\n'
      'blocking/flickr-1-2.3-4_5.mp4,blocking,3,0\n'
    ),
  },
  [
    # Of the same name as another, which is missing.
    'training/blocking/yt-zxQfALnTdfc_56.mp4',
    'training/adult+female+singing/0P3XG_vf91c_35.mp4',
    'validation/blocking/flickr-1-2.3-4_5.mp4',
  ],
  ['validation/blocking/getty-karate-video-id635808620_4.mp4'],
  ['clapping', 'blocking', 'adult+female+singing'],
  {
    'train': {
      'blocking/yt-zxQfALnTdfc_56': 1,
      'adult+female+singing/0P3XG_vf91c_35': 2,
    },
    'validation': {'blocking/flickr-1-2.3-4_5': 1},
  },
  {'train': {'clapping': 1}},
  ['blocking/getty-karate-video-id635808620_4'],
)

MULTI_MOMENTS = Case(
  'multi_moments_in_time',
  {
    'moments_categories.txt': 'crafting,0\npaddling,1\nraining,2\n',
    'trainingSet.csv': (
      'raining/0-3-6-2-9-1-2-6-14603629126_5.mp4,2,1\n'
      'crafting/yt-zxQfALnTdfc_56.mp4,0\n'
      'crafting/gone_56.mp4,0,1,2\n'
    ),
    'validationSet.csv': (
      'paddling/vine-11_3.mp4,0,1,2\npaddling/vine-12_3.mp4,1\n'
    ),
  },
  [
    'videos/raining/0-3-6-2-9-1-2-6-14603629126_5.mp4',
    'videos/crafting/yt-zxQfALnTdfc_56.mp4',
    'videos/paddling/vine-11_3.mp4',
  ],
  ['videos/paddling/vine-12_3.mp4'],
  ['crafting', 'paddling', 'raining'],
  {
    'train': {
      'raining/0-3-6-2-9-1-2-6-14603629126_5': (2, 1),
      'crafting/yt-zxQfALnTdfc_56': (0,),
    },
    'validation': {'paddling/vine-11_3': (0, 1, 2)},
  },
  {'train': {'crafting': 1, 'paddling': 1, 'raining': 1}},
  ['paddling/vine-12_3'],
)


def segments(*given: tuple[str, float, float]) -> list[dict[str, Any]]:
  return [{'label': label, 'segment': [a, b]} for label, a, b in given]


ACTIVITYNET_TEXTS = {
  'activity_net.v1-3.min.json': json.dumps(
    {
      'version': 'VERSION 1.3',
      'taxonomy': [],
      'database': {
        name: {
          'duration': 4.0,
          'subset': subset,
          'resolution': '320x240',
          'url': f'https://www.youtube.com/watch?v={name}',
          'annotations': found,
        }
        for name, subset, found in (
          (
            '_o-xPK-8AD8',
            'training',
            segments(('Baking cookies', 0.6, 2.0), ('BMX', 2.0, 9.0)),
          ),
          ('gone-xPK-8A', 'training', segments(('BMX', 0.0, 1.0))),
          ('sJFgo9H6zNo', 'validation', segments(('Archery', 0.0, 1.0))),
          ('bXdq2zI1Ms0', 'validation', segments(('Zumba', 0, 1))),
          ('4XtEpvJ0FvU', 'testing', []),
        )
      },
    }
  )
}
ACTIVITYNET = Case(
  'activitynet',
  ACTIVITYNET_TEXTS,
  ['v_4XtEpvJ0FvU.mp4', 'train/v__o-xPK-8AD8.mp4', 'val/sJFgo9H6zNo.webm'],
  ['val/v_bXdq2zI1Ms0.mp4'],
  ['Archery', 'BMX', 'Baking cookies', 'Zumba'],
  {'train': {'v__o-xPK-8AD8': 2}, 'validation': {'v_sJFgo9H6zNo': 0}},
  {'train': {'BMX': 1}},
  ['v_bXdq2zI1Ms0'],
)
ACTIVITYNET_SEGMENTS = dataclasses.replace(
  ACTIVITYNET,
  name='activitynet/segments',
  labels={
    'train': {'v__o-xPK-8AD8/0': 2, 'v__o-xPK-8AD8/1': 1},
    'validation': {'v_sJFgo9H6zNo/0': 0},
  },
  undecodable=['v_bXdq2zI1Ms0/0'],
)

HVU = Case(
  'hvu',
  {
    'HVU_Tags_Categories_V1.0.csv': (
      'Tag,Category\npowerbocking,action\nplant,object\nhouse,object\n'
      'suburb,scene\nasphalt,attribute\nrecreation,concept\nparty,event\n'
    ),
    'HVU_Train_V1.0.csv': (
      'Tags,youtube_id,time_start,time_end\n'
      'house|plant|powerbocking,eeEC-oWWAM0,90.5,92.5\n'
      'suburb|party,gD_G1b0wV5I,101.123,103.97\n'
      'suburb|plant,GoneG1b0wV5,1,3\n'
    ),
    'HVU_Val_V1.0.csv': (
      'Tags,youtube_id,time_start,time_end\n'
      'asphalt|plant,OLpWTpTC4P8,57.0,67.0\n'
      'recreation|plant,xsPKW4tZZBc,233.0,243.0\n'
    ),
  },
  [
    'videos_train/eeEC-oWWAM0_000905_000925.mp4',
    'videos_train/gD_G1b0wV5I_001011_001039.mp4',
    'videos_val/OLpWTpTC4P8_000570_000670.mp4',
  ],
  ['videos_val/xsPKW4tZZBc_002330_002430.mp4'],
  # Sorted by category, then by name.
  [
    'powerbocking',
    'asphalt',
    'recreation',
    'party',
    'house',
    'plant',
    'suburb',
  ],
  {
    'train': {
      'eeEC-oWWAM0_000905_000925': (4, 5, 0),
      'gD_G1b0wV5I_001011_001039': (6, 3),
    },
    'validation': {'OLpWTpTC4P8_000570_000670': (1, 5)},
  },
  {'train': {'plant': 1, 'suburb': 1}},
  ['xsPKW4tZZBc_002330_002430'],
)
HVU_OBJECT = dataclasses.replace(
  HVU,
  name='hvu/object',
  classes=['house', 'plant'],
  labels={
    'train': {'eeEC-oWWAM0_000905_000925': (0, 1)},
    'validation': {'OLpWTpTC4P8_000570_000670': (1,)},
  },
  missing={'train': {'plant': 1}},
)

OMNISOURCE = Case(
  'omnisource',
  {
    'annotations/k200_actions.txt': 'zumba\narm_wrestling\nabseiling\n',
    'annotations/kinetics_200/k200_train.txt': (
      '0074cdXclLU.mp4 2\nzzzlyL61Fyo.mp4 0\n'
    ),
    'annotations/kinetics_200/k200_val.txt': (
      '01fAWEHzudA.mp4 1\nzymA_6jZIz4.mp4 0\n'
    ),
    'annotations/kinetics_raw_200/slowonly_8x8_kinetics_raw_200.json': (
      json.dumps(
        [
          {
            'video_dir': f'pref_{name[0]}/{name}',
            'label': label,
            'num_clips': 10,
            'positive_clip_inds': clips,
          }
          for name, label, clips in (
            ('D32_1gwq35E', 2, [0, 2]),
            ('-G-5CJ0JkKY', 1, [2]),
            ('T4h1bvOd9DA', 0, []),
          )
        ]
      )
    ),
    'annotations/insvideo_200/slowonly_8x8_insvideo_200_wodup.txt': (
      '002/abseil/B00arxogubl.mp4 2\n000/zumba/B00arxogubl.mp4 0\n'
    ),
  },
  ['kinetics_200_train/0074cdXclLU.mp4', 'kinetics_200_val/01fAWEHzudA.mp4'],
  ['kinetics_200_val/zymA_6jZIz4.mp4'],
  ['zumba', 'arm_wrestling', 'abseiling'],
  {'train': {'0074cdXclLU': 2}, 'validation': {'01fAWEHzudA': 1}},
  {'train': {'zumba': 1}},
  ['zymA_6jZIz4'],
)
OMNISOURCE_INSVIDEO = dataclasses.replace(
  OMNISOURCE,
  name='omnisource/insvideo',
  videos=[*OMNISOURCE.videos, 'insvideo_200/002/abseil/B00arxogubl.mp4'],
  labels={
    'train': {'002/abseil/B00arxogubl': 2},
    'validation': {'01fAWEHzudA': 1},
  },
)
OMNISOURCE_RAW = dataclasses.replace(
  OMNISOURCE,
  name='omnisource/kinetics_raw',
  videos=[
    *OMNISOURCE.videos,
    'kinetics_raw_200_train/pref_D/D32_1gwq35E/part_0.mp4',
    'kinetics_raw_200_train/pref_D/D32_1gwq35E/part_2.mp4',
    'kinetics_raw_200_train/pref_T/T4h1bvOd9DA/part_2.mp4',
  ],
  labels={
    'train': {
      'pref_D/D32_1gwq35E/part_0': 2,
      'pref_D/D32_1gwq35E/part_2': 2,
    },
    'validation': {'01fAWEHzudA': 1},
  },
  missing={'train': {'arm_wrestling': 1}},
)

CASES = (
  # Places in the label maps of others.
  kinetics_case(400, 196, 208),
  kinetics_case(600, 287, 308),
  kinetics_case(700, 327, 354),
  ucf101_case(3),
  HMDB51,
  DIVING48,
  SOMETHING_V1,
  SOMETHING_V2,
  JESTER,
  MOMENTS,
  MULTI_MOMENTS,
  ACTIVITYNET,
  ACTIVITYNET_SEGMENTS,
  HVU,
  HVU_OBJECT,
  OMNISOURCE,
  OMNISOURCE_INSVIDEO,
  OMNISOURCE_RAW,
)
NAMES = tuple(dict.fromkeys(case.name.split('/')[0] for case in CASES))


def frames(number: int) -> np.ndarray:
  """Frames of 32x32 pixels whose brightness tells the video and the frame."""
  levels = 20 + 10 * (number % 8) + 5 * np.arange(FRAMES)
  levels = levels[:, None, None, None].astype(np.uint8)
  return np.broadcast_to(levels, (FRAMES, 32, 32, 3))


def lay_out(case: Case, folder: pathlib.Path) -> pathlib.Path:
  """Writes the files of a case."""
  for name, text in case.texts.items():
    write(folder / name, text.encode())
  for number, name in enumerate(case.videos):
    if not name.endswith('.jpg'):
      write(folder / name, decoding.encode_mp4(frames(number), fps=FPS))
      continue
    for index, frame in enumerate(frames(number), 1):
      path = folder / name.replace('00001', f'{index:05d}')
      write(path, cv2.imencode('.jpg', frame)[1].tobytes())
  for name in case.broken:
    write(folder / name, b'broken')
  return folder


def write(path: pathlib.Path, content: bytes) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content)


def definition(name: str, out: pathlib.Path) -> published.AnnotatedBuilder:
  name, _, config = name.partition('/')
  module = importlib.import_module(f'{name}.{name}_dataset_builder')
  return module.Builder(data_dir=out, config=config or None)


def check(case: Case, folder: pathlib.Path) -> None:
  """Reads back what was prepared."""
  report = json.loads((folder / 'report.json').read_text('utf-8'))
  assert report['missing'] == case.missing
  assert report['missing_videos'] == dict.fromkeys(case.missing, 1)
  listed = (folder / 'missing.txt').read_text('utf-8').splitlines()
  assert [line.split()[0] for line in listed] == list(case.missing)
  assert sorted(v['video_id'] for v in report['undecodable']) == sorted(
    case.undecodable
  )
  assert set(report['splits']) == set(case.labels)
  for split, expected in case.labels.items():
    dataset = records.PreparedDataset(str(folder), split, '')
    if isinstance(case.classes, Mapping):
      assert {n: dataset.class_names[n] for n in case.classes} == case.classes
      assert len(dataset.class_names) == max(case.classes) + 1
    else:
      assert dataset.class_names == tuple(case.classes)
    examples = [dataset[i] for i in range(len(dataset))]
    assert {e.video_id: e.label for e in examples} == expected
    is_frames = case.videos[0].endswith('.jpg')
    for example in examples:
      assert decoding.probe(example.video).fps == (12 if is_frames else FPS)


@pytest.mark.parametrize('case', CASES, ids=lambda case: case.name)
def test_a_dataset_as_published_is_prepared(case, tmp_path):
  builder = definition(case.name, tmp_path / 'out')
  builder.download_and_prepare(
    download_config=tfds.download.DownloadConfig(
      manual_dir=lay_out(case, tmp_path / 'videos'), try_download_gcs=False
    )
  )
  check(case, pathlib.Path(builder.data_path))
  if case is ACTIVITYNET_SEGMENTS:
    dataset = records.PreparedDataset(str(builder.data_path), 'train', '')
    levels = {
      example.video_id: [
        round(float(frame.mean()) / 5)
        for frame in decoding.decode_all(example.video)
      ]
      for example in (dataset[0], dataset[1])
    }
    # Five frames a second: from 0.6 s to 2 s, and from then to the end.
    first = frames(1)[0].mean() // 5
    assert levels == {
      'v__o-xPK-8AD8/0': [first + n for n in range(3, 10)],
      'v__o-xPK-8AD8/1': [first + n for n in range(10, 20)],
    }


def test_the_command_prepares_a_dataset_of_a_name_that_tfds_has(tmp_path):
  case = ucf101_case(1)
  done = tfds_command.tfds_build(
    DATA / 'ucf101',
    f'--manual_dir={lay_out(case, tmp_path / "videos")}',
    f'--data_dir={tmp_path / "out"}',
    '--config=split1',
    cwd=tmp_path,
  )
  assert done.returncode == 0, done.stderr
  assert 'Traceback' not in done.stderr
  check(case, tmp_path / 'out' / 'ucf101' / 'split1' / '1.0.0')


@pytest.mark.parametrize('number', [400, 600, 700])
def test_ids_of_kinetics_are_places_in_the_sorted_labels(number):
  names = (DATA / f'kinetics{number}' / 'labels.txt').read_text().splitlines()
  assert len(set(names)) == number
  assert names == sorted(names, key=lambda name: name.replace(' ', '_'))
  # No two are one when written otherwise.
  assert len({kinetics.key(name) for name in names}) == number
  assert (names[0], names[-1]) == ('abseiling', 'zumba')


def test_the_test_list_of_kinetics_is_a_split_if_it_has_labels(tmp_path):
  case = kinetics_case(400, 0, 0)
  folder = lay_out(dataclasses.replace(case, videos=(), broken=()), tmp_path)
  (folder / 'annotations' / 'test.csv').write_text(
    'label,youtube_id,time_start,time_end,split,is_cc\n'
    'zumba,--6q_33gNew,132,142,test,0\n'
  )
  _, listed = definition('kinetics400', tmp_path).read_annotations(folder)
  assert [video for video in listed if video.split == 'test'] == [
    published.Listed('--6q_33gNew_000132_000142', 'zumba', 'test')
  ]


@pytest.mark.parametrize('number', [400, 600, 700])
def test_lists_of_kinetics_may_have_other_names(number, tmp_path):
  builder = definition(f'kinetics{number}', tmp_path)
  case = kinetics_case(number, 0, 0)
  folder = lay_out(dataclasses.replace(case, videos=(), broken=()), tmp_path)
  expected = builder.read_annotations(folder)
  assert len(expected[1]) == 5
  for form in ('kinetics_{}.csv', f'kinetics-{number}_{{}}.csv', '{}.txt'):
    names = {'train': 'train', 'validate': 'val', 'val': 'val', 'test': 'test'}
    for path in sorted((folder / 'annotations').iterdir()):
      word = path.stem.replace('-', '_').split('_')[-1]
      path.rename(path.with_name(form.format(names[word])))
    assert builder.read_annotations(folder) == expected


def test_the_long_videos_of_omnisource_need_not_be_cut(tmp_path):
  videos = ('kinetics_raw_200_train/pref_D/D32_1gwq35E.mp4',)
  case = dataclasses.replace(OMNISOURCE_RAW, videos=videos)
  folder = lay_out(case, tmp_path)
  builder = definition(case.name, tmp_path)
  _, listed = builder.read_annotations(folder)
  expected = [
    ('pref_D/D32_1gwq35E', 'abseiling', (0.0, 10.0), 'part_0'),
    ('pref_D/D32_1gwq35E', 'abseiling', (20.0, 30.0), 'part_2'),
    ('pref_-/-G-5CJ0JkKY', 'arm_wrestling', (20.0, 30.0), 'part_2'),
  ]
  assert listed[:3] == [
    published.Listed(
      name, label, 'train', times, f'{name}/{part}', in_folder=True
    )
    for name, label, times, part in expected
  ]
  # The same as a list of lines.
  path = folder / 'annotations/kinetics_raw_200/slowonly_8x8_kinetics_raw_200'
  path.with_suffix('.json').unlink()
  path.with_suffix('.txt').write_text(
    'pref_D/D32_1gwq35E 2 10 0 2\npref_-/-G-5CJ0JkKY 1 10 2\n'
    'pref_T/T4h1bvOd9DA 0 10\n'
  )
  assert builder.read_annotations(folder)[1] == listed


def test_lists_of_omnisource_without_labels_take_them_of_kinetics(tmp_path):
  folder = lay_out(OMNISOURCE, tmp_path)
  lists = folder / 'annotations' / 'kinetics_200'
  (lists / 'k200_train.txt').write_text('0074cdXclLU.mp4\n')
  builder = definition('omnisource', tmp_path)
  with pytest.raises(errors.UserError, match='train.csv'):
    builder.read_annotations(folder)
  header = 'label,youtube_id,time_start,time_end,split\n'
  (folder / 'train.csv').write_text(
    f'{header}arm wrestling,0074cdXclLU,1,11,train\nyoga,x,1,11,train\n'
  )
  (folder / 'val.csv').write_text(header)
  _, listed = builder.read_annotations(folder)
  assert (listed[0].name, listed[0].label) == ('0074cdXclLU', 'arm_wrestling')
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
def test_a_malformed_file_is_named_in_one_line(name, file, text, tmp_path):
  dataset = name.split('/')[0]
  case = next(c for c in CASES if c.name.split('/')[0] == dataset)
  case = dataclasses.replace(case, videos=(), broken=())
  folder = lay_out(case, tmp_path / 'videos')
  builder = definition(name, tmp_path / 'out')
  builder.read_annotations(folder)
  (folder / file).write_text(text)
  with pytest.raises(errors.UserError) as caught:
    builder.read_annotations(folder)
  assert str(caught.value).startswith(f'{folder / file}: ')
  assert '\n' not in str(caught.value)


# Not needed, or not by the default configuration.
OPTIONAL = (
  'annotations/test.csv',
  'something-something-v1-test.csv',
  'labels/something-something-v2-test.json',
  'jester-v1-test.csv',
  'annotations/kinetics_raw_200/slowonly_8x8_kinetics_raw_200.json',
  'annotations/insvideo_200/slowonly_8x8_insvideo_200_wodup.txt',
)


@pytest.mark.parametrize('name', NAMES)
def test_a_missing_file_is_named(name, tmp_path):
  case = next(c for c in CASES if c.name.split('/')[0] == name)
  texts = case.texts
  if case is HMDB51:  # Each split has lists of its own.
    texts = {file: text for file, text in texts.items() if 'split2' in file}
  builder = definition(case.name, tmp_path / 'out')
  folder = tmp_path / 'videos'
  for absent in texts:
    for file, text in texts.items():
      write(folder / file, text.encode())
    complete = builder.read_annotations(folder)
    (folder / absent).unlink()
    if absent in OPTIONAL:
      assert builder.read_annotations(folder) == complete
      continue
    with pytest.raises(errors.UserError) as caught:
      builder.read_annotations(folder)
    assert str(caught.value).startswith(f'{folder}: the annotation file ')
    assert str(caught.value).endswith(' is not there')
    assert pathlib.Path(absent).name in str(caught.value)


@pytest.mark.parametrize('name', NAMES)
def test_a_readme_says_what_a_definition_reads(name, tmp_path):
  readme = (DATA / name / 'README.md').read_text('utf-8')
  assert f'tfds build data/{name} --manual_dir=' in readme
  builder = definition(name, tmp_path)
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
  assert builder.info.description.strip() == readme.strip()


def test_every_definition_of_published_videos_is_tested_here():
  folders = {path.parent.name for path in DATA.glob('*/*_dataset_builder.py')}
  assert folders - set(NAMES) == {'motion', 'video_folder'}
  listed = (tfds_command.REPOSITORY / 'README.md').read_text('utf-8')
  for name in NAMES:
    assert f'](data/{name}/README.md)' in listed
