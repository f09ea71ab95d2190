"""From the parameters of one model to those of another, by PyTorch's names.

A model of images becomes one of videos (inflation), pooling kernels take the
sizes of another pyramid, and a head of other classes is made anew.
"""

from collections.abc import Mapping
import dataclasses
import math
import re

from jaxtyping import Float
import numpy as np

from dualformer_jax.errors import UserError

# What may differ between two models: the pyramid of global attention, ...
_PYRAMID = re.compile(r'.*\.attn\.(sr|lr\.[013]|norm)\.\w+')
_KERNEL = re.compile(r'.*\.attn\.(sr|lr\.[03])\.weight')
# ... the head, and what images lack: time.
_HEAD = re.compile(r'cls_head\..*')
_WITH_TIME = re.compile(
  r'.*(patch_embeds\.\d+\.proj|pos_block\.\d+\.proj\.0|attn\.(sr|lr\.0))'
  r'\.weight'
)
_IMAGE_HEAD = re.compile(r'head\..*')
_BACKBONE = 'backbone.'


@dataclasses.dataclass(frozen=True)
class Transfer:
  """What became of the parameters, by PyTorch's names.

  Attributes:
    state_dict: name -> array, for all names of the target.
    taken: as they were.
    inflated: from images to videos.
    adapted: resized to another pyramid.
    anew: not of the source, because it has none that would do.
    left_out: of the source, without a use.
  """

  state_dict: dict[str, np.ndarray]
  taken: list[str] = dataclasses.field(default_factory=list)
  inflated: list[str] = dataclasses.field(default_factory=list)
  adapted: list[str] = dataclasses.field(default_factory=list)
  anew: list[str] = dataclasses.field(default_factory=list)
  left_out: list[str] = dataclasses.field(default_factory=list)

  def table(self) -> list[str]:
    """Returns lines for the user: how many of each, and which if not taken."""
    lines = []
    for title, names in (
      ('taken', self.taken),
      ('inflated from images', self.inflated),
      ('resized to this pyramid', self.adapted),
      ('made anew', self.anew),
      ('left out', self.left_out),
    ):
      if names:
        which = '' if names is self.taken else f'  {_summary(names)}'
        lines.append(f'{title + ":":25}{len(names):4} parameters{which}')
    return lines


def is_image_model(state_dict: Mapping[str, np.ndarray]) -> bool:
  """Returns whether a state_dict is of the model of images (ImageNet)."""
  weight = state_dict.get('patch_embeds.0.proj.weight')
  return weight is not None and weight.ndim == 4


def transfer(
  source: Mapping[str, np.ndarray],
  initial: Mapping[str, np.ndarray],
  *,
  keep_head: bool,
  name: str,
) -> Transfer:
  """Returns the parameters of a model, made from those of another.

  An image model's kernels are repeated along time and divided by how often, as
  the published implementation does; the second kernel of its coarse level,
  which it lacks, becomes a mean. Kernels that pool to another pyramid are
  resized linearly and scaled so that what pools to a mean still does; levels
  that the source lacks pool to a mean.

  Args:
    source: PyTorch's name -> array; of an image model, without `backbone.`.
    initial: the same of the wanted model as it is initialised.
    keep_head: whether the classes are the same; else the head is made anew.
    name: of the source, for the error: its file.

  Raises:
    UserError: the models differ in more than classes, clips and pyramid; lists
      all that does not fit.
  """
  image = is_image_model(source)
  if image:
    source = {
      key if _IMAGE_HEAD.fullmatch(key) else _BACKBONE + key: array
      for key, array in source.items()
    }
  result = Transfer({})
  problems = []
  for key, start in initial.items():
    found = source.get(key)
    array, kind = start, result.anew
    if _HEAD.fullmatch(key) and (
      not keep_head or found is None or found.shape != start.shape
    ):
      pass
    elif found is None and _PYRAMID.fullmatch(key):
      if _KERNEL.fullmatch(key):
        array = np.full_like(start, 1 / math.prod(start.shape[2:]))
      else:  # a norm that changes nothing yet, or a bias
        is_one = key.endswith(('.weight', '.running_var'))
        array = np.full_like(start, is_one)
      if image and '.lr.3.' in key:
        kind = result.inflated
    elif found is None:
      problems.append(f'{key} {start.shape} is missing')
      continue
    elif found.shape == start.shape:
      array, kind = found, result.taken
    elif image and _WITH_TIME.fullmatch(key) and found.ndim == 4:
      array, kind = _resized(found[:, :, None], start.shape), result.inflated
      if found.shape[2:] != start.shape[3:]:
        kind = result.adapted
    elif _KERNEL.fullmatch(key) and found.shape[:2] == start.shape[:2]:
      array, kind = _resized(found, start.shape), result.adapted
    else:
      problems.append(f'{key} is {found.shape}, expected {start.shape}')
      continue
    result.state_dict[key] = array
    kind.append(key)
  for key in source:
    if key in initial:
      continue
    if any(p.fullmatch(key) for p in (_HEAD, _PYRAMID, _IMAGE_HEAD)):
      result.left_out.append(key)
    else:
      problems.append(f'{key[:100]!r} {source[key].shape} is unknown')
  if problems:
    more = len(problems) - 10
    raise UserError(
      f'{name} is of another model: {"; ".join(problems[:10])}'
      + (f'; and {more} more' if more > 0 else '')
      + '. Only classes, frames, image size and pyramid may differ: use the '
      'config of that model'
    )
  return result


def _resized(
  kernel: Float[np.ndarray, 'o i t h w'], shape: tuple[int, ...]
) -> Float[np.ndarray, 'o i t2 h2 w2']:
  """Resizes the last three axes linearly, keeping what a kernel sums to."""
  result = kernel.astype(np.float64)
  for axis in (2, 3, 4):
    weights = _linear(result.shape[axis], shape[axis])
    result = np.moveaxis(
      np.tensordot(weights, result, ((1,), (axis,))), 0, axis
    )
  return result.astype(kernel.dtype)


def _linear(old: int, new: int) -> Float[np.ndarray, 'new old']:
  """The matrix of a linear resize with pixel centres at halves, times old/new.

  A shrinking one averages over what falls into a new pixel. Rows add up to
  old / new, so a constant kernel keeps its sum.
  """
  scale = old / new
  places = (np.arange(new) + 0.5) * scale - 0.5
  if new < old:
    width = scale
  else:
    width, places = 1.0, np.clip(places, 0, old - 1)
  weights = 1 - np.abs(places[:, None] - np.arange(old)) / width
  weights = np.maximum(weights, 0)
  return weights / weights.sum(axis=1, keepdims=True) * scale


def _summary(names: list[str]) -> str:
  """Which they are: one name for those that differ in numbers of blocks."""
  kinds: dict[str, int] = {}
  for name in names:
    kind = re.sub(r'(blocks|patch_embeds|pos_block)(\.\d+)+', r'\1.*', name)
    kind = kind.removeprefix(_BACKBONE)
    kinds[kind] = kinds.get(kind, 0) + 1
  return ', '.join(kinds)
