"""Converts a video to the form in which a dataset stores it."""

from collections.abc import Iterable, Iterator
import dataclasses
import pathlib

import cv2

from dualformer_jax import errors
from dualformer_jax.input_pipeline import video_reader, video_writer
from dualformer_jax.input_pipeline.preparing import (
  frame_folders,
  near_duplicates,
)

# A record is a protocol buffer, which is limited to 2 GiB.
MAX_BYTES = (2 << 30) - (1 << 20)
FORMS = ('reencoded', 'verbatim', 'jpeg')


@dataclasses.dataclass(frozen=True)
class Storage:
  """How a dataset stores its videos.

  Attributes:
    form: 'reencoded' is H.264 that is cheap to seek in: all frames, a keyframe
      every 16 frames, and nothing predicted from frames of odd indices.
      'verbatim' is the original file. 'jpeg' is one JPEG image per frame, the
      fastest for sparse sampling.
    crf: quality of 'reencoded', 0 (lossless) to 51. A step of 1 is 0.65 dB
      and a tenth of the bytes.
    short_side: videos with a longer short side are downscaled to this many
      pixels, unless stored verbatim. Training crops from a short side of 256.
  """

  form: str = 'reencoded'
  crf: int = 23
  jpeg_quality: int = 90
  short_side: int = 256

  def __post_init__(self):
    for name, is_valid, expected in (
      ('form', self.form in FORMS, f'one of {", ".join(FORMS)}'),
      ('crf', 0 <= self.crf <= 51, '0 to 51'),
      ('jpeg_quality', 1 <= self.jpeg_quality <= 100, '1 to 100'),
      ('short_side', self.short_side >= 2, 'at least 2'),
    ):
      if not is_valid:
        raise errors.UserError(
          f'{name} must be {expected}, got {getattr(self, name)!r}'
        )


@dataclasses.dataclass(frozen=True)
class Video:
  """A video to be stored in a dataset.

  Attributes:
    video_id: readable name, unique in the dataset.
    path: a video file, or a folder of frames (img_00001.jpg, ...).
    labels: names of its classes; one unless the dataset is multi-label.
    seconds: start and end of the part to store; None for the whole video.
    fps: frames per second of a folder of frames.
  """

  video_id: str
  path: pathlib.Path
  labels: tuple[str, ...]
  split: str = ''
  seconds: tuple[float, float] | None = None
  fps: float = 25.0


def transcode(video: Video, storage: Storage) -> tuple[bytes, str]:
  """Decodes a video to its end; returns a video file and the frames' signature.

  Raises:
    VideoError: the video cannot be decoded to its end, has no frames, or is
      too large for a record.
    OSError: a file cannot be read.
  """
  signature = near_duplicates.Signature()
  if storage.form == 'verbatim' and video.seconds is not None:
    raise video_reader.VideoError(
      'a part of a file cannot be stored verbatim; re-encode it'
    )
  if video.path.is_dir():
    images = frame_folders.read(video.path)
    content = _encode(images, video.fps, storage, signature)
  else:
    with video_reader.VideoReader(video.path) as reader:
      timed = reader.iter_timed(*(video.seconds or ()))
      frames = (frame for _, frame in timed)
      if storage.form == 'verbatim':
        for _ in signature.watch(frames):
          pass
        content = video.path.read_bytes()
      else:
        images = (('', b'', frame) for frame in frames)
        content = _encode(images, reader.fps, storage, signature)
  if len(content) > MAX_BYTES:
    raise video_reader.VideoError(
      f'is too large for a record: {len(content)} bytes, limit {MAX_BYTES}'
    )
  return content, signature.text()


def _encode(
  images: Iterable[tuple[str, bytes, video_reader.Frame]],
  fps: float,
  storage: Storage,
  signature: near_duplicates.Signature,
) -> bytes:
  """Returns a video of images, given with their names and files if any."""
  if storage.form == 'reencoded':
    frames = _downscale((frame for *_, frame in images), storage.short_side)
    return video_writer.encode_mp4(
      signature.watch(frames), fps=fps, crf=storage.crf
    )
  size, jpegs = (0, 0), []
  for name, content, frame in images:
    is_jpeg = content.startswith(b'\xff\xd8')
    if storage.form == 'verbatim':
      if not is_jpeg:
        raise video_reader.VideoError(
          f'frame {name} is not a JPEG file and cannot be stored verbatim;'
          ' re-encode it'
        )
    elif not is_jpeg or min(frame.shape[:2]) > storage.short_side:
      (frame,) = _downscale([frame], storage.short_side)
      bgr = cv2.cvtColor(frame, cv2.COLOR_RGB2BGR)
      quality = [cv2.IMWRITE_JPEG_QUALITY, storage.jpeg_quality]
      content = cv2.imencode('.jpg', bgr, quality)[1].tobytes()
    (frame,) = signature.watch([frame])
    size = size if jpegs else frame.shape[:2]
    jpegs.append(content)
  height, width = size
  return video_writer.mux_jpegs(jpegs, fps=fps, height=height, width=width)


def _downscale(
  frames: Iterable[video_reader.Frame], short_side: int
) -> Iterator[video_reader.Frame]:
  """Yields frames of one size, that of the first, downscaled to even sides."""
  size = None
  for frame in frames:
    if size is None:
      size = frame.shape[:2]
      scale = short_side / min(size)
      if scale < 1.0:
        size = tuple(2 * round(side * scale / 2) for side in size)
    if frame.shape[:2] != size:
      # INTER_AREA averages all source pixels; bilinear would skip some.
      frame = cv2.resize(frame, size[::-1], interpolation=cv2.INTER_AREA)
    yield frame
