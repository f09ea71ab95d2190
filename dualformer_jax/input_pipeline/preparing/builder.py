"""The base class of all dataset builders in data/."""

from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import os
import pathlib
import shutil
import sys
from typing import Any

from absl import logging
import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import writer
from tensorflow_datasets.proto import tf_example_pb2

from dualformer_jax import errors, files, progress
from dualformer_jax.input_pipeline import dataset
from dualformer_jax.input_pipeline.preparing import (
  reports,
  transcoding,
  video_store,
)
from dualformer_jax.stop_signals import stop_signals

_FORMS = {
  'reencoded': 'H.264, a keyframe every 16 frames, short side at most 256.',
  'verbatim': 'The original files.',
  'jpeg': 'One JPEG image per frame, short side at most 256.',
}
# Of free space before work begins; less is a full disk.
_MIN_BYTES = 1 << 20
# Videos, each with the result of storing it.
StoredVideos = Sequence[tuple[transcoding.Video, video_store.StoredVideo]]


@dataclasses.dataclass(eq=False)
class StorageConfig(tfds.core.BuilderConfig):
  """A variant, if the dataset has several, and a way to store videos."""

  variant: str = ''
  form: str = 'reencoded'
  crf: int = 23
  jpeg_quality: int = 90
  short_side: int = 256


def storage_configs(
  *variants: str, config_class: type[StorageConfig] = StorageConfig
) -> dict[str, StorageConfig]:
  """Returns the configurations of a dataset by name, the default one first.

  Those of each variant are VARIANT (re-encoded), VARIANT_verbatim and
  VARIANT_jpeg; without variants they are `reencoded`, `verbatim` and `jpeg`.
  """
  configs = {}
  for form, text in _FORMS.items():
    for variant in variants or ('',):
      suffix = '' if form == 'reencoded' else f'_{form}'
      name = f'{variant}{suffix}' if variant else form
      configs[name] = config_class(
        name=name, description=text, variant=variant, form=form
      )
  return configs


class VideoDatasetBuilder(
  tfds.core.GeneratorBasedBuilder, skip_registration=True
):
  """Stores videos as TFDS records, with a report.

  A subclass implements `_split_generators`: it finds the videos, passes them to
  `store` and the result to `examples`. TFDS renames the folder of records when
  all files are complete, the report among them.

  Attributes:
    VERSION: to be increased when videos or labels change.
    CLASS_NAMES: by label; None if `class_label.names` is set before the first
      example.
    findings: further fields of the report.
  """

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'First release.'}
  CONFIGS: dict[str, StorageConfig] = {}
  CLASS_NAMES: Sequence[str] | None = None
  MULTI_LABEL = False
  findings: dict[str, Any]
  _entries: list[reports.Entry]
  _beam: dict[str, Any]

  def __init_subclass__(cls, **arguments: Any):
    # Only the default: `tfds build` builds all of BUILDER_CONFIGS.
    cls.BUILDER_CONFIGS = list(cls.CONFIGS.values())[:1]
    super().__init_subclass__(**arguments)

  @classmethod
  def get_builder_config(
    cls, name: str, version: str | tfds.core.Version | None = None
  ) -> StorageConfig | None:
    """Returns the configuration of a name, also if it is not the default."""
    del version
    return cls.CONFIGS.get(name)

  @property
  def config(self) -> StorageConfig:
    """The configuration; raises UserError if its variant does not exist."""
    config = self.builder_config
    assert isinstance(config, StorageConfig)
    variants = dict.fromkeys(c.variant for c in self.CONFIGS.values())
    if config.variant not in variants:
      raise errors.UserError(
        f'--config: variant must be one of {", ".join(variants)}, got'
        f' {config.variant!r}'
      )
    return config

  @property
  def class_label(self) -> tfds.features.ClassLabel:
    """The feature with the names of the classes."""
    features: Any = self.info.features
    label = features['label']
    return label.feature if self.MULTI_LABEL else label

  def _info(self) -> tfds.core.DatasetInfo:
    names = None if self.CLASS_NAMES is None else list(self.CLASS_NAMES)
    label: Any = tfds.features.ClassLabel(names=names)
    features = tfds.features.FeaturesDict(
      {
        'video': tfds.features.Tensor(shape=(), dtype=np.object_),  # A file.
        'label': tfds.features.Sequence(label) if self.MULTI_LABEL else label,
        'video_id': tfds.features.Text(),  # Unique in the dataset.
      }
    )
    return self.dataset_info_from_configs(features=features)

  def download_and_prepare(self, **options: Any) -> None:  # pyright: ignore
    """Builds the dataset, or resumes a build; raises UserError if it fails."""
    _prepare_command()
    folder = self._store_folder
    try:
      files.check_writable(folder, _MIN_BYTES)
      folder.parent.mkdir(parents=True, exist_ok=True)
      with _lock(folder.with_name(f'{folder.name}.lock')):
        for partial in folder.parent.glob(f'incomplete.*_{self.version}'):
          shutil.rmtree(partial)
        super().download_and_prepare(**options)
        shutil.rmtree(folder, ignore_errors=True)
      # Saves the index of each split, so that copies of the dataset have it.
      for split in self.info.splits:
        dataset.PreparedDataset(str(self.data_path), split, '')
    except Exception as error:
      # TensorFlow and ArrayRecord have their own types of errors of files.
      is_of_file = isinstance(error, OSError) or any(
        os.strerror(number) in str(error) for number in files.DISK_ERRORS
      )
      if isinstance(error, errors.UserError) or not is_of_file:
        raise
      reason = getattr(error, 'strerror', None) or str(error)
      path = getattr(error, 'filename', None) or folder.parent
      raise errors.UserError(
        f'{path}: {" ".join(reason.split())}; run the command again to resume'
      ) from error

  @property
  def _store_folder(self) -> pathlib.Path:
    """Where transcoded videos are kept until the dataset is complete."""
    # Its own folder has another name until it is complete.
    return pathlib.Path(self.data_path).parent / f'.{self.version}-videos'

  def _download_and_prepare(
    self,
    dl_manager: tfds.download.DownloadManager,
    download_config: tfds.download.DownloadConfig,
  ) -> None:
    self.findings = {}
    self._entries = []
    runner, options = download_config.beam_runner, download_config.beam_options
    is_on_beam = runner or options
    self._beam = {'runner': runner, 'options': options} if is_on_beam else {}
    super()._download_and_prepare(dl_manager, download_config)
    report = reports.make_report(
      self.info.full_name, self.class_label.names, self._entries, self.findings
    )
    summary = reports.write(pathlib.Path(self.data_path), report)
    for line in summary.splitlines():
      logging.info('%s', line)

  def _example_writer(self) -> writer.ExampleWriter:
    file_format: Any = self.info.file_format
    return _OrderedWriter(file_format)

  def manual_folder(
    self, dl_manager: tfds.download.DownloadManager
  ) -> pathlib.Path:
    """Returns --manual_dir; raises UserError if it is missing or empty."""
    try:
      return pathlib.Path(dl_manager.manual_dir)
    except AssertionError:
      raise errors.UserError(
        '--manual_dir: expected a folder of videos, but it is missing or empty;'
        f' data/{self.name}/README.md describes its content'
      ) from None

  def store(
    self, videos: Sequence[transcoding.Video], folder: pathlib.Path
  ) -> StoredVideos:
    """Transcodes videos, in processes or on the workers of a cluster.

    Videos that cannot be decoded are skipped and reported. If there are no
    others, raises a UserError that names the folder.
    """
    store = self._store
    verb = 'Reading' if store.storage.form == 'verbatim' else 'Re-encoding'
    if self._beam:
      import apache_beam as beam

      logging.info('%s %d videos on Beam', verb, len(videos))
      # After which add_all finds all of them done.
      with beam.Pipeline(**self._beam) as pipeline:
        _ = pipeline | _map_on_beam(store.add, videos)
    results = store.add_all(videos, len(os.sched_getaffinity(0)))
    results = progress.track(results, f'{verb} videos', len(videos), 'videos')
    good, undecodable = [], []
    for video, stored in zip(videos, results, strict=True):
      if not stored.reason:
        good.append((video, stored))
        continue
      logging.warning('Skipping %s: %s', video.video_id, stored.reason)
      undecodable.append({'video_id': video.video_id, 'reason': stored.reason})
    self.findings.update(
      stored_as=dataclasses.asdict(store.storage),
      found=len(videos),
      good=len(good),
      undecodable=undecodable,
    )
    if not good:
      raise errors.UserError(
        f'{os.fsencode(folder).decode("utf-8", "backslashreplace")}: none of'
        f' {len(videos)} videos can be decoded; the reasons are logged above'
      )
    return good

  def examples(
    self, stored: StoredVideos, splits: Iterable[str]
  ) -> dict[str, Any]:
    """Reports and returns the examples for TFDS; drops empty splits."""
    videos: dict[str, list[transcoding.Video]] = {split: [] for split in splits}
    for video, result in stored:
      videos[video.split].append(video)
      self._report(video.split, video.video_id, video.labels, result)
    example = functools.partial(
      self._store.example, multi_label=self.MULTI_LABEL
    )
    map_videos = _map_on_beam if self._beam else map
    return {s: map_videos(example, v) for s, v in videos.items() if v}

  def report_examples(
    self, split: str, examples: Iterable[dict[str, Any]]
  ) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields keys and examples of videos that need no store; reports them."""
    for example in examples:
      video = example['video']
      digest = hashlib.sha256(video).hexdigest()
      result = video_store.StoredVideo('', digest, len(video))
      self._report(split, example['video_id'], [example['label']], result)
      yield example['video_id'], example

  def _generate_examples(self, *args: Any) -> Any:
    raise NotImplementedError  # `_split_generators` returns the examples.

  @property
  def _store(self) -> video_store.VideoStore:
    config = self.config
    quality = config.crf, config.jpeg_quality
    storage = transcoding.Storage(config.form, *quality, config.short_side)
    return video_store.VideoStore(self._store_folder, storage)

  def _report(
    self,
    split: str,
    video_id: str,
    labels: Sequence[str | int],
    stored: video_store.StoredVideo,
  ) -> None:
    numbers = tuple(map(int, map(self.class_label.encode_example, labels)))
    self._entries.append(reports.Entry(split, video_id, numbers, stored))


class _OrderedWriter(writer.ExampleWriter):
  """Writes the features of each record in one order, the same in every run."""

  def write(self, path: Any, examples: Iterable[tuple[Any, bytes]]) -> Any:
    pb2: Any = tf_example_pb2  # Its classes are created at import.
    example = pb2.Example
    ordered = (
      (key, example.FromString(record).SerializeToString(deterministic=True))
      for key, record in examples
    )
    return super().write(path, ordered)


def _map_on_beam(function: Callable[..., Any], items: Sequence[Any]) -> Any:
  import apache_beam as beam  # Rarely needed, and takes seconds to import.

  return beam.Create(list(items)) | beam.Reshuffle() | beam.Map(function)


@contextlib.contextmanager
def _lock(path: pathlib.Path) -> Iterator[None]:
  """Holds a lock, which ends with the process, however that ends."""
  with open(path, 'wb') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise errors.UserError(
        f'{path.parent}: another process is building this dataset; wait until'
        ' it is done'
      ) from None
    yield
    path.unlink(missing_ok=True)


@functools.cache
def _prepare_command() -> None:
  """Makes `tfds`, which handles no errors, end without tracebacks.

  With status 2 for a UserError, and at once for a signal. A program
  that builds a dataset handles errors and signals itself.
  """
  if pathlib.Path(sys.argv[0]).name != 'tfds':
    return
  stop_signals.exit_message = '; run the command again to resume'
  stop_signals.install()
  previous = sys.excepthook

  def hook(kind: type[BaseException], error: BaseException, traceback: Any):
    if isinstance(error, errors.UserError):
      print(f'\nerror: {error}', file=sys.stderr)
      sys.exit(2)
    previous(kind, error, traceback)

  sys.excepthook = hook
