"""Datasets as their publishers ship them, and what must be prepared of them."""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import pathlib
from typing import Any

DATA = pathlib.Path(__file__).resolve().parents[2] / 'data'


@dataclasses.dataclass
class Case:
  """A dataset as published, and the expected result.

  Attributes:
    name: of the dataset, with its configuration if that is not the default.
    texts: annotation files; their lines are as published.
    videos: files, or first frames of folders (00001.jpg).
    damaged: the same, but undecodable.
    classes: all names by label, or some of them, the last one included.
    labels: of each good video, by split.
    missing: number of missing videos by split and class; one video per split.
    undecodable: video_id of damaged videos.
  """

  name: str
  texts: Mapping[str, str]
  videos: Sequence[str]
  damaged: Sequence[str]
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
  return Case(
    f'ucf101/split{split}',
    {
      # Numbered from 1; with line ends of Windows.
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


# Every class has a list; most of these contain only unused videos.
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
      'Damaged_brush_hair_u_nm_np1_ba_goo_2.avi 2 \n',
    }.items()
  },
  [
    'kick/winKen_kick_u_cm_np1_ri_bad_1.avi',
    'kick_ball/April_09_kick_ball_u_nm_np1_ba_goo_0.avi',
    'kick_ball/#20_Rhythm_kick_ball_u_nm_np1_fr_goo_0.avi',
    'brush_hair/Unused_brush_hair_u_nm_np1_ba_goo_1.avi',
  ],
  ['brush_hair/Damaged_brush_hair_u_nm_np1_ba_goo_2.avi'],
  {0: 'brush_hair', 20: 'kick', 21: 'kick_ball', 50: 'wave'},
  {
    'train': {'kick_ball/#20_Rhythm_kick_ball_u_nm_np1_fr_goo_0': 21},
    'test': {
      'kick/winKen_kick_u_cm_np1_ri_bad_1': 20,
      'kick_ball/April_09_kick_ball_u_nm_np1_ba_goo_0': 21,
    },
  },
  {'train': {'brush_hair': 1}},
  ['brush_hair/Damaged_brush_hair_u_nm_np1_ba_goo_2'],
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
    # A video of the same name in another folder is missing.
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
  # Indices in the label maps of MMAction2.
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
