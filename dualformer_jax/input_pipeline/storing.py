"""What a prepared dataset keeps of a video: re-encoded, verbatim or as JPEGs.

Everything happens file by file, in a folder that outlives an interruption: what
was done is not done again. Workers, local or of a cluster, need nothing but
this package.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Sequence
from concurrent import futures
from concurrent.futures import process
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import pathlib
import re
import signal
import sys
import tempfile
import threading
from typing import Any

import cv2
import numpy as np

from dualformer_jax import errors
from dualformer_jax.input_pipeline import decoding, near_copies

# A record (a protocol buffer) holds less than 2 GiB.
MAX_BYTES = (2 << 30) - (1 << 20)
FORMS = ('reencoded', 'verbatim', 'jpeg')
# Changes with what is made of the same video, so that nothing old is taken.
_VERSION = 2
_FRAME_FILES = frozenset({'.jpg', '.jpeg', '.png', '.webp', '.bmp'})
_JPEG_FILES = frozenset({'.jpg', '.jpeg'})


@dataclasses.dataclass(frozen=True)
class Storage:
  """How videos are kept.

  Attributes:
    form: 'reencoded': H.264 that is cheap to seek in, with every frame of the
      original, a keyframe every 16 and no B-frames. 'verbatim': the file as it
      is. 'jpeg': a JPEG file for each frame, for sparse sampling.
    crf: of H.264, 0 (lossless) to 51. 18 can hardly be told from the original;
      20 is 0.9 dB farther from it, a fifth smaller and decodes faster.
    jpeg_quality: 1 to 100.
    short_side: larger videos are made smaller, to this many pixels; unless
      they are kept verbatim. Training takes crops of a short side of 256.
  """

  form: str = 'reencoded'
  crf: int = 20
  jpeg_quality: int = 90
  short_side: int = 256

  def __post_init__(self):
    if self.form not in FORMS:
      raise errors.UserError(
        f'form must be one of {", ".join(FORMS)}, got {self.form!r}'
      )
    if not 0 <= self.crf <= 51 or not 1 <= self.jpeg_quality <= 100:
      raise errors.UserError(
        'crf must be in 0..51 and jpeg_quality in 1..100, got'
        f' {self.crf} and {self.jpeg_quality}'
      )
    if self.short_side < 2:
      raise errors.UserError(f'short_side must be 2 or more: {self.short_side}')


@dataclasses.dataclass(frozen=True)
class Video:
  """A video that is to go into a dataset.

  Attributes:
    video_id: where it comes from, in a form to be read; unique.
    path: the file, or a folder of frames (img_00001.jpg, ...).
    label: the name of its class, or the names of all of them.
    split: name of its split; '' where that is still to be chosen.
    seconds: from when on and until when it is wanted; None for all of it.
    fps: frames per second of a folder of frames.
  """

  video_id: str
  path: pathlib.Path
  label: str | tuple[str, ...]
  split: str = ''
  seconds: tuple[float, float] | None = None
  fps: float = 25.0

  @property
  def labels(self) -> tuple[str, ...]:
    """The names of its classes, one or several."""
    return (self.label,) if isinstance(self.label, str) else self.label


@dataclasses.dataclass(frozen=True)
class Stored:
  """What became of a video.

  Attributes:
    reason: why there is nothing to store; '' if there is.
    sha256: of what is stored.
    num_bytes: of the same.
    signature: of what it looks like; see near_copies.
  """

  reason: str
  sha256: str = ''
  num_bytes: int = 0
  signature: str = ''


def store(
  video: Video, storage: Storage, folder: str | os.PathLike[str]
) -> Stored:
  """Decodes a video to its end, and puts what is kept of it into `folder`.

  Does nothing if it was done before to the same file. What is wrong with the
  video is told in the result, never raised.
  """
  try:
    base = _place(video, storage, folder)
  except OSError as error:
    return Stored(
      f'is not a file, or a link that leads nowhere ({error.strerror})'
    )
  outcome = base.with_suffix('.json')
  if outcome.exists():
    return Stored(**json.loads(outcome.read_text('utf-8')))
  signature = near_copies.Signature()
  try:
    content = _content(video, storage, signature)
    if len(content) > MAX_BYTES:
      raise decoding.VideoError(
        f'takes {len(content)} bytes, more than a record can'
      )
  except decoding.VideoError as error:
    stored, content = Stored(error.reason), b''
  except Exception as error:  # Whatever a stranger's file brings about.
    reason = ' '.join(f'{type(error).__name__}: {error}'.split())
    stored, content = Stored(reason), b''
  else:
    sha256 = hashlib.sha256(content).hexdigest()
    stored = Stored('', sha256, len(content), signature.text())
  base.parent.mkdir(parents=True, exist_ok=True)
  if content and not _is_kept_in_place(video, storage):
    _write(base.with_suffix('.video'), content)
  _write(outcome, json.dumps(dataclasses.asdict(stored)).encode())
  return stored


def read(
  video: Video, storage: Storage, folder: str | os.PathLike[str]
) -> bytes:
  """What `store` kept of a video, the content of a file.

  Raises:
    UserError: it is not what was stored; the original may have changed since.
  """
  try:
    base = _place(video, storage, folder)
    stored = Stored(**json.loads(base.with_suffix('.json').read_text('utf-8')))
    if _is_kept_in_place(video, storage):
      content = video.path.read_bytes()
    else:
      content = base.with_suffix('.video').read_bytes()
  except OSError as error:
    raise errors.UserError(
      f'{video.path}: changed while the dataset was made ({error}); begin again'
    ) from error
  if hashlib.sha256(content).hexdigest() != stored.sha256:
    raise errors.UserError(
      f'{video.path}: changed while the dataset was made, or {base}.video is'
      f' damaged; remove {os.fspath(folder)} and begin again'
    )
  return content


def example(
  video: Video, storage: Storage, folder: str | os.PathLike[str]
) -> tuple[str, dict[str, Any]]:
  """The key and the features of a video that was stored, as TFDS takes them."""
  label = video.label if isinstance(video.label, str) else list(video.label)
  return video.video_id, {
    'video': read(video, storage, folder),
    'label': label,
    'video_id': video.video_id,
  }


def store_all(
  videos: Sequence[Video],
  storage: Storage,
  folder: str | os.PathLike[str],
  num_processes: int,
) -> Iterator[Stored]:
  """`store` of each video, in order, in processes of their own.

  A file on which the decoder crashes takes its process with it, and nothing
  else.
  """
  num_processes = max(1, min(num_processes, len(videos)))
  pool = _pool(num_processes)
  waiting: collections.deque[tuple[Video, futures.Future[Stored]]]
  waiting = collections.deque()

  def oldest() -> Stored:
    video, future = waiting.popleft()
    try:
      return future.result()
    except process.BrokenProcessPool:
      # One of those under way was to blame: alone, it shows which.
      return _store_alone(video, storage, folder)

  try:
    for video in videos:
      with _main_module_hidden():
        try:
          future = pool.submit(store, video, storage, folder)
        except process.BrokenProcessPool:
          pool.shutdown()
          pool = _pool(num_processes)
          future = pool.submit(store, video, storage, folder)
      waiting.append((video, future))
      if len(waiting) > 4 * num_processes:
        yield oldest()
    while waiting:
      yield oldest()
  finally:
    pool.shutdown(cancel_futures=True)


def _store_alone(
  video: Video, storage: Storage, folder: str | os.PathLike[str]
) -> Stored:
  with _pool(1) as pool:
    try:
      with _main_module_hidden():
        return pool.submit(store, video, storage, folder).result()
    except process.BrokenProcessPool:
      return Stored('makes the decoder crash, or run out of memory')


def _pool(num_processes: int) -> futures.ProcessPoolExecutor:
  return futures.ProcessPoolExecutor(
    num_processes,
    # Forked processes would inherit locks that TensorFlow's threads hold.
    mp_context=multiprocessing.get_context('spawn'),
    initializer=_start_worker,
  )


def _start_worker() -> None:
  # Control-C is for the parent; and when that is gone, nothing is left to do.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  parent = multiprocessing.parent_process()
  assert parent is not None

  def end_with_parent() -> None:
    parent.join()
    os._exit(1)

  threading.Thread(target=end_with_parent, daemon=True).start()
  cv2.setNumThreads(0)


@contextlib.contextmanager
def _main_module_hidden() -> Iterator[None]:
  """Spares new processes the import of the command that runs here.

  They would import the whole of TFDS and Beam, for seconds, and use none of it.
  """
  main = sys.modules['__main__'].__dict__
  hidden = {n: main.pop(n) for n in ('__file__', '__spec__') if n in main}
  main['__spec__'] = None
  try:
    yield
  finally:
    main.update(hidden)


def _place(
  video: Video, storage: Storage, folder: str | os.PathLike[str]
) -> pathlib.Path:
  """Where a video is kept, without extension: other content, another place.

  Raises:
    OSError: there is no such file.
  """
  status = video.path.stat()
  key = json.dumps(
    [
      _VERSION,
      video.video_id,
      os.path.abspath(video.path),
      status.st_size,
      status.st_mtime_ns,
      video.seconds,
      video.fps,
      dataclasses.astuple(storage),
    ]
  )
  name = hashlib.sha256(key.encode('utf-8', 'surrogateescape')).hexdigest()
  return pathlib.Path(folder) / name[:2] / name[2:34]


def _write(path: pathlib.Path, content: bytes) -> None:
  """Writes a file that is there whole, or not at all."""
  with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
    file.write(content)
  os.replace(file.name, path)


def _is_kept_in_place(video: Video, storage: Storage) -> bool:
  """Whether the original is what goes into the dataset."""
  return storage.form == 'verbatim' and not video.path.is_dir()


def _content(
  video: Video, storage: Storage, signature: near_copies.Signature
) -> bytes:
  """What is kept of a video, whose frames the signature sees.

  Raises:
    VideoError: it cannot be decoded to its end, or has no frame.
  """
  path = video.path
  if storage.form == 'verbatim' and video.seconds is not None:
    raise decoding.VideoError(
      'is wanted in part, which cannot be kept verbatim; re-encode it'
    )
  if path.is_dir():
    if storage.form != 'reencoded':
      return _jpeg_files(path, video.fps, storage, signature)
    frames = _shrunk(_frames_of_folder(path), storage.short_side)
    return decoding.encode_mp4(
      signature.watch(frames), fps=video.fps, crf=storage.crf
    )
  if not path.is_file():
    raise decoding.VideoError('is neither a file nor a folder of frames')
  if storage.form == 'verbatim':
    content = path.read_bytes()
    for _ in signature.watch(decoding.stream_frames(path)):
      pass
    return content
  fps = decoding.frame_rate(path)
  frames = signature.watch(
    _shrunk(decoding.stream_frames(path, video.seconds), storage.short_side)
  )
  if storage.form == 'reencoded':
    return decoding.encode_mp4(frames, fps=fps, crf=storage.crf)
  return _mux([_jpeg(frame, storage.jpeg_quality) for frame in frames], fps)


def _shrunk(
  frames: Iterable[decoding.Frame], short_side: int
) -> Iterator[decoding.Frame]:
  """Frames of the first one's size, or smaller, with even sides."""
  size = None
  for frame in frames:
    if size is None:
      scale = min(1.0, short_side / min(frame.shape[:2]))
      height, width = frame.shape[:2]
      if scale < 1.0:
        height, width = (2 * round(s * scale / 2) for s in (height, width))
      size = height, width
    if frame.shape[:2] != size:
      # Averages all pixels that become one: bilinear would skip some of them.
      frame = cv2.resize(frame, size[::-1], interpolation=cv2.INTER_AREA)
    yield frame


def _jpeg(frame: decoding.Frame, quality: int) -> bytes:
  _, content = cv2.imencode(
    '.jpg',
    cv2.cvtColor(frame, cv2.COLOR_RGB2BGR),
    [cv2.IMWRITE_JPEG_QUALITY, quality],
  )
  return content.tobytes()


def _mux(jpegs: Sequence[bytes], fps: float) -> bytes:
  if not jpegs:
    raise decoding.VideoError('holds no frames')
  height, width = _decoded(jpegs[0], '').shape[:2]
  return decoding.mux_jpegs(jpegs, fps=fps, height=height, width=width)


def _files_of_frames(folder: pathlib.Path) -> list[pathlib.Path]:
  """The frames in a folder by their numbers, those of optical flow left out."""
  files = [
    path
    for path in folder.iterdir()
    if path.suffix.lower() in _FRAME_FILES
    and not path.name.startswith(('flow_', '.'))
  ]
  if not files:
    raise decoding.VideoError('is a folder without frames (img_00001.jpg, ...)')

  def number(path: pathlib.Path) -> tuple[int, str]:
    digits = re.search(r'(\d+)$', path.stem)
    return (int(digits[1]) if digits else -1, path.name)

  return sorted(files, key=number)


def _decoded(content: bytes, name: str) -> decoding.Frame:
  try:
    bgr = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
  except cv2.error:  # An empty file, or one that claims to be huge.
    bgr = None
  if bgr is None:
    raise decoding.VideoError(f'frame {name} cannot be decoded')
  # OpenCV fills up what is missing of a JPEG file, and says nothing.
  if content[:2] == b'\xff\xd8' and b'\xff\xd9' not in content[-64:]:
    raise decoding.VideoError(f'frame {name} is cut short')
  return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)


def _frames_of_folder(folder: pathlib.Path) -> Iterator[decoding.Frame]:
  for path in _files_of_frames(folder):
    yield _decoded(path.read_bytes(), path.name)


def _jpeg_files(
  folder: pathlib.Path,
  fps: float,
  storage: Storage,
  signature: near_copies.Signature,
) -> bytes:
  """The frames of a folder as JPEG files; as they are, where possible."""
  jpegs = []
  for path in _files_of_frames(folder):
    content = path.read_bytes()
    (frame,) = signature.watch([_decoded(content, path.name)])
    is_jpeg = path.suffix.lower() in _JPEG_FILES
    if storage.form == 'verbatim' and not is_jpeg:
      raise decoding.VideoError(
        f'frame {path.name} is not JPEG, and cannot be kept verbatim'
      )
    small = min(frame.shape[:2]) <= storage.short_side
    if not (is_jpeg and small) and storage.form != 'verbatim':
      (frame,) = _shrunk([frame], storage.short_side)
      content = _jpeg(frame, storage.jpeg_quality)
    jpegs.append(content)
  return _mux(jpegs, fps)
