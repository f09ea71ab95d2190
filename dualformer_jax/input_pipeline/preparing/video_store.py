"""Transcoded videos in a folder that outlives an interrupted build."""

from collections.abc import Iterator, Sequence
import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any

import cv2

from dualformer_jax import errors, files
from dualformer_jax.input_pipeline import video_reader
from dualformer_jax.input_pipeline.preparing import process_map, transcoding

# Part of every key. To be increased when the same video is stored differently.
_VERSION = 5


@dataclasses.dataclass(frozen=True)
class StoredVideo:
  """The result of storing a video: digest, size and signature of its content.

  `reason` is why it cannot be stored, '' if it was stored.
  """

  reason: str
  sha256: str = ''
  num_bytes: int = 0
  signature: str = ''


@dataclasses.dataclass(frozen=True)
class VideoStore:
  """Transcodes videos, each one once, also over several runs of a build.

  Can be pickled, so that workers of a cluster share one store. Keys depend on
  path, size and modification time.
  """

  folder: pathlib.Path
  storage: transcoding.Storage

  def add(self, video: transcoding.Video) -> StoredVideo:
    """Transcodes a video once; an undecodable one is a result with a reason."""
    try:
      base = self._base_path(video)
    except OSError as error:
      return StoredVideo(f'is not a file, or a broken link ({error.strerror})')
    cv2.setNumThreads(0)  # There is a process for each core.
    result = base.with_suffix('.json')
    if result.exists():
      return StoredVideo(**json.loads(result.read_text('utf-8')))
    try:
      content, signature = transcoding.transcode(video, self.storage)
    except video_reader.VideoError as error:
      stored = StoredVideo(error.reason)
    except Exception as error:  # A malformed file can raise anything.
      reason = ' '.join(f'{type(error).__name__}: {error}'.split())
      stored = StoredVideo(reason)
    else:
      sha256 = hashlib.sha256(content).hexdigest()
      stored = StoredVideo('', sha256, len(content), signature)
      if not self._is_original_used(video):
        with files.atomic_write(base.with_suffix('.video')) as file:
          file.write(content)
    with files.atomic_write(result) as file:
      file.write(json.dumps(dataclasses.asdict(stored)).encode())
    return stored

  def add_all(
    self, videos: Sequence[transcoding.Video], num_processes: int
  ) -> Iterator[StoredVideo]:
    """Yields the results in order; a file may crash the decoder."""
    num_processes = max(1, min(num_processes, len(videos)))
    for stored in process_map.map_in_processes(self.add, videos, num_processes):
      yield stored or StoredVideo('crashes the decoder, or exhausts the memory')

  def read(self, video: transcoding.Video) -> bytes:
    """Returns the stored content; raises UserError if it has changed."""
    try:
      base = self._base_path(video)
      result = json.loads(base.with_suffix('.json').read_text('utf-8'))
      is_original = self._is_original_used(video)
      path = video.path if is_original else base.with_suffix('.video')
      content = path.read_bytes()
    except OSError as error:
      raise errors.UserError(
        f'{video.path}: changed during the build ({error}); run it again'
      ) from error
    if hashlib.sha256(content).hexdigest() != result['sha256']:
      raise errors.UserError(
        f'{path}: changed during the build; remove {os.fspath(self.folder)} and'
        ' run it again'
      )
    return content

  def example(
    self, video: transcoding.Video, multi_label: bool
  ) -> tuple[str, dict[str, Any]]:
    """Returns the key and the features of a stored video for TFDS."""
    return video.video_id, {
      'video': self.read(video),
      'label': list(video.labels) if multi_label else video.labels[0],
      'video_id': video.video_id,
    }

  def _base_path(self, video: transcoding.Video) -> pathlib.Path:
    """Returns the path of a video's files, without suffix."""
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
        dataclasses.astuple(self.storage),
      ]
    )
    name = hashlib.sha256(key.encode('utf-8', 'surrogateescape')).hexdigest()
    return self.folder / name[:2] / name[2:34]

  def _is_original_used(self, video: transcoding.Video) -> bool:
    return self.storage.form == 'verbatim' and not video.path.is_dir()
