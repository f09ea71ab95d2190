"""Videos that are folders of image files: img_00001.jpg, img_00002.jpg, ..."""

from collections.abc import Iterator
import pathlib
import re

import cv2
import numpy as np

from dualformer_jax.input_pipeline import video_reader

SUFFIXES = frozenset({'.jpg', '.jpeg', '.png'})


def read(
  folder: pathlib.Path,
) -> Iterator[tuple[str, bytes, video_reader.Frame]]:
  """Yields name, content and image of the frames, ordered by number.

  Files of optical flow (flow_*) and hidden files are skipped. Raises VideoError
  if there are no frames, or one is damaged.
  """
  paths = [
    path
    for path in folder.iterdir()
    if path.suffix.lower() in SUFFIXES
    and not path.name.startswith(('flow_', '.'))
  ]
  if not paths:
    raise video_reader.VideoError(
      'is a folder without frames (img_00001.jpg, ...)'
    )
  for path in sorted(paths, key=_number):
    content = path.read_bytes()
    try:
      bgr = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:  # An empty file, or one that claims to be huge.
      bgr = None
    # OpenCV silently fills in the missing part of a truncated JPEG file.
    is_cut = content[:2] == b'\xff\xd8' and b'\xff\xd9' not in content[-64:]
    if bgr is None or is_cut:
      raise video_reader.VideoError(f'frame {path.name} cannot be decoded')
    yield path.name, content, cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)


def _number(path: pathlib.Path) -> tuple[int, str]:
  digits = re.search(r'(\d+)$', path.stem)
  return (int(digits[1]) if digits else -1, path.name)
