"""What a compiled program does on each device, read from its text (HLO).

XLA's own cost analysis counts a loop's body once and leaves collectives out;
here a body counts as often as it runs, and each collective tells which axes of
the mesh it goes along.
"""

from collections.abc import Iterator
import dataclasses
import functools
import itertools
import math
import re

import jax
import numpy as np

_BITS = {'pred': 8, 's4': 4, 'u4': 4, 'bf16': 16, 'token': 0, 'opaque': 0}
_COLLECTIVES = (
  'all-reduce',
  'all-gather',
  'reduce-scatter',
  'all-to-all',
  'ragged-all-to-all',
  'collective-broadcast',
  'collective-permute',
)
# What moves nothing, or what its parts or its beginning are counted for.
_FREE = (
  'parameter',
  'constant',
  'tuple',
  'get-tuple-element',
  'bitcast',
  'while',
  'call',
  'conditional',
  'after-all',
  'partition-id',
  'replica-id',
  'opt-barrier',
)
_COMPUTATION = re.compile(r'^(?:ENTRY )?%?([\w.-]+) .*\{$')
_INSTRUCTION = re.compile(r'^\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\(')
_SHAPE = re.compile(r'(\w+)\[([\d,]*)\](?:\{([^}]*)\})?')
_TILE = re.compile(r':T\(([\d,]+)\)')


@dataclasses.dataclass(frozen=True)
class Collective:
  """An array that devices send each other, alone or together with others.

  Attributes:
    kind: 'all-reduce', 'all-gather', 'reduce-scatter', ...
    axes: of the mesh, along which it goes.
    devices: how many take part in one group.
    count: how often a step does it.
    elements: of the array, where it is larger: what an all-gather puts out,
      what a reduce-scatter takes.
    bytes: the same.
    name: of what it was made for, in the program as written.
  """

  kind: str
  axes: tuple[str, ...]
  devices: int
  count: int
  elements: int
  bytes: int
  name: str

  def sent(self) -> float:
    """Returns the bytes that each device sends in a step, by a ring."""
    rounds = 2 if self.kind == 'all-reduce' else 1
    share = 1.0
    if self.kind in ('all-reduce', 'all-gather', 'reduce-scatter'):
      share = (self.devices - 1) / self.devices
    return self.count * rounds * share * self.bytes


@dataclasses.dataclass(frozen=True)
class Program:
  """What one device does in a step.

  Attributes:
    flops: of matrix products, two for each multiply-add.
    bytes: that go to and from memory, with all operands read once, and with
      what the layout of arrays adds to them.
    collectives: in the order of the text.
    unknown_loops: loops that are counted as if they ran once, as the text does
      not tell how often they do.
  """

  flops: int
  bytes: int
  collectives: tuple[Collective, ...]
  unknown_loops: int


@dataclasses.dataclass(frozen=True)
class _Shape:
  dtype: str
  dims: tuple[int, ...]
  in_memory: bool  # and not in what a chip keeps beside its arithmetic
  # How it lies in memory: axes from the innermost outwards, of which the first
  # are padded to multiples of the tile's sizes, whose last is the innermost.
  order: tuple[int, ...]
  tile: tuple[int, ...]

  @property
  def elements(self) -> int:
    return math.prod(self.dims)

  @property
  def bytes(self) -> int:
    bits = _BITS.get(self.dtype)
    if bits is None:
      bits = int(re.findall(r'\d+', self.dtype)[0])  # f32, s8, f8e4m3fn
    return math.ceil(self.elements * bits / 8)

  @property
  def padded_bytes(self) -> int:
    """What it takes in memory: TPUs fill up rows of 128, among others."""
    if not self.elements:
      return 0
    padded = self.bytes
    sizes = itertools.chain(
      (self.dims[a] for a in self.order), itertools.repeat(1)
    )
    for size, multiple in zip(sizes, reversed(self.tile), strict=False):
      padded = padded * (-(-size // multiple) * multiple) // size
    return padded


@dataclasses.dataclass(frozen=True)
class _Instruction:
  name: str
  shapes: tuple[_Shape, ...]
  opcode: str
  operands: tuple[str, ...]
  rest: str  # of the line, behind the operands
  inside: str  # the parentheses
  is_root: bool

  def attribute(self, name: str) -> str:
    """Returns the value of an attribute such as calls=%computation, or ''."""
    found = re.search(rf'\b{name}=%?([^\s,]+)', self.rest)
    return found[1] if found else ''


_Computation = dict[str, _Instruction]


def read(text: str, mesh: jax.sharding.Mesh) -> Program:
  """Returns what a program does.

  Args:
    text: of the compiled program, as jax.stages.Compiled.as_text() gives it.
    mesh: that it was compiled for.
  """
  computations, entry = _parse(text)
  flops = moved = unknown = 0
  collectives = []

  def visit(name: str, times: int, fused: bool) -> None:
    nonlocal flops, moved, unknown
    computation = computations[name]
    scatters = fused and any(
      i.opcode == 'dynamic-slice' for i in computation.values()
    )
    for i in computation.values():
      match i.opcode:
        case 'dot':
          flops += times * _dot_flops(i, computation)
        case 'convolution':
          flops += times * _convolution_flops(i, computation)
        case 'custom-call':  # a kernel says itself what it does
          told = re.search(r'"cost_estimate":\{"flops":"(\d+)"', i.rest)
          flops += times * int(told[1]) if told else 0
      kind = i.opcode.removesuffix('-start')
      if kind in _COLLECTIVES:
        # On TPUs, what scatters a sum is a fusion of a sum and a slice.
        if kind == 'all-reduce' and scatters:
          kind = 'reduce-scatter'
        collectives.extend(_collectives(i, kind, computation, times, mesh))
      if not fused:
        moved += times * _bytes(i, computation, computations)
      trips = 1
      if i.opcode == 'while':
        trips = _trips(i, computations)
        if not trips:
          unknown += 1
          trips = 1
      for called in _called(i):
        visit(called, times * trips, fused or i.opcode == 'fusion')

  visit(entry, 1, False)
  return Program(flops, moved, tuple(collectives), unknown)


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
  computations: dict[str, _Computation] = {}
  entry = ''
  current: _Computation = {}
  for line in text.splitlines():
    if line.endswith('{') and not line.startswith((' ', 'HloModule')):
      found = _COMPUTATION.match(line)
      if found:
        current = computations[found[1]] = {}
        entry = found[1] if line.startswith('ENTRY') else entry
      continue
    found = _INSTRUCTION.match(line)
    if not found:
      continue
    end, depth = found.end(), 1
    while depth and end < len(line):
      depth += {'(': 1, ')': -1}.get(line[end], 0)
      end += 1
    inside = line[found.end() : end - 1]
    current[found[2]] = _Instruction(
      name=found[2],
      shapes=_shapes(found[3]),
      opcode=found[4],
      operands=tuple(re.findall(r'%([\w.-]+)', inside)),
      rest=line[end:],
      inside=inside,
      is_root=bool(found[1]),
    )
  return computations, entry


def _shapes(text: str) -> tuple[_Shape, ...]:
  return tuple(
    _Shape(
      dtype,
      tuple(int(d) for d in dims.split(',') if d),
      not re.search(r'S\([1-9]', layout),
      tuple(int(d) for d in re.findall(r'\d+', layout.split(':')[0])),
      tuple(int(d) for d in tile[1].split(',')) if tile else (),
    )
    for dtype, dims, layout in _SHAPE.findall(text)
    for tile in [_TILE.search(layout)]
  )


def _called(i: _Instruction) -> Iterator[str]:
  """Yields the computations that an instruction runs (not those of a sum)."""
  match i.opcode:
    case 'while':
      yield i.attribute('body')
    case 'call':
      yield i.attribute('to_apply')
    case 'conditional':  # as if all branches were taken: an upper bound
      for names in re.findall(
        r'(?:branch_computations|true_computation|false_computation)='
        r'(\{[^}]*\}|%[\w.-]+)',
        i.rest,
      ):
        yield from re.findall(r'%([\w.-]+)', names)
    case _:
      if called := i.attribute('calls'):
        yield called


def _trips(i: _Instruction, computations: dict[str, _Computation]) -> int:
  """Returns how often a loop runs; 0 if that is not to be seen.

  Loops over arrays count from 0 to a constant, the only one in the condition.
  """
  if known := re.search(r'known_trip_count[^\d]*(\d+)', i.rest):
    return int(known[1])
  limits = set()

  def look(name: str) -> None:
    for j in computations[name].values():
      if j.opcode == 'constant' and re.fullmatch(r'\d+', j.inside):
        limits.add(int(j.inside))
      for called in _called(j):
        look(called)

  look(i.attribute('condition'))
  return limits.pop() if len(limits) == 1 else 0


def _operand_shapes(
  i: _Instruction, computation: _Computation
) -> list[tuple[_Shape, ...]]:
  return [computation[name].shapes for name in i.operands]


def _dot_flops(i: _Instruction, computation: _Computation) -> int:
  (left,) = computation[i.operands[0]].shapes
  contracted = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', i.rest)
  assert contracted
  inner = math.prod(left.dims[int(d)] for d in contracted[1].split(',') if d)
  return 2 * inner * i.shapes[0].elements


def _convolution_flops(i: _Instruction, computation: _Computation) -> int:
  """Counts the products of values that are there, not those with padding.

  XLA makes convolutions of matrix products, with dimensions of a batch as
  dilated spatial ones, of which one product in many is of values.
  """
  left, right = (shapes[0] for shapes in _operand_shapes(i, computation))
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', i.rest)
  assert labels
  window = _window(i.rest)
  spatial = len(labels[1]) - 2
  products = 1
  for axis in range(spatial):
    label = str(axis)

    def value(name: str, default: str, axis: int = axis) -> str:
      return window[name].split('x')[axis] if name in window else default

    products *= _valid_products(
      size=left.dims[labels[1].index(label)],
      kernel=right.dims[labels[2].index(label)],
      output=i.shapes[0].dims[labels[3].index(label)],
      stride=int(value('stride', '1')),
      before=int(value('pad', '0_0').split('_')[0]),
      dilation=int(value('lhs_dilate', '1')),
      kernel_dilation=int(value('rhs_dilate', '1')),
    )
  batch = i.shapes[0].dims[labels[3].index('b')]
  outputs = i.shapes[0].dims[labels[3].index('f')]
  inputs = right.dims[labels[2].index('i')]
  return 2 * products * batch * outputs * inputs


def _window(rest: str) -> dict[str, str]:
  found = re.search(r'window=\{([^}]*)\}', rest)
  return dict(re.findall(r'(\w+)=([\dx_-]+)', found[1]) if found else [])


@functools.cache
def _valid_products(
  size: int,
  kernel: int,
  output: int,
  stride: int,
  before: int,
  dilation: int,
  kernel_dilation: int,
) -> int:
  """Returns how many pairs of output and kernel positions meet a value."""
  at = (
    np.arange(output)[:, None] * stride
    - before
    + np.arange(kernel) * kernel_dilation
  )
  inside = (at >= 0) & (at <= (size - 1) * dilation) & (at % dilation == 0)
  return int(inside.sum())


def _bytes(
  i: _Instruction,
  computation: _Computation,
  computations: dict[str, _Computation],
) -> int:
  """Returns the bytes that an instruction reads and writes in memory."""
  if i.opcode in _FREE or i.opcode.endswith('-done'):
    return 0
  if i.opcode == 'custom-call' and 'AllocateBuffer' in i.rest:
    return 0
  written = sum(shape.padded_bytes for shape in i.shapes if shape.in_memory)
  if i.opcode.endswith('-start'):  # its tuple names its operands as well
    written = (
      i.shapes[0].padded_bytes if i.shapes and i.shapes[0].in_memory else 0
    )
  if i.opcode in ('slice-start', 'dynamic-slice-start'):
    # Names its operands, then what it cuts out of the first.
    result = i.shapes[len(i.operands)]
    source = computation[i.operands[0]].shapes[0]
    return result.padded_bytes * (result.in_memory + source.in_memory)
  if i.opcode in ('dynamic-slice', 'slice', 'gather'):
    return 2 * written
  if i.opcode == 'dynamic-update-slice':
    update = computation[i.operands[1]].shapes[0]
    return 2 * update.padded_bytes if i.shapes[0].in_memory else 0
  parts = {}  # of operands of which only a part is read
  if i.opcode == 'fusion':
    inside = computations[i.attribute('calls')]
    parts = _parts(inside)
    root = next((j for j in inside.values() if j.is_root), None)
    if root and root.opcode == 'dynamic-update-slice' and written:
      written = inside[root.operands[1]].shapes[0].padded_bytes
  read: dict[str, int] = {}  # once each: x * x names its operand twice
  for index, name in enumerate(i.operands):
    shapes = computation[name].shapes
    whole = sum(shape.padded_bytes for shape in shapes if shape.in_memory)
    read[name] = min(whole, read.get(name, 0) + parts.get(index, whole))
  return sum(read.values()) + written


def _parts(inside: _Computation) -> dict[int, int]:
  """Returns the bytes that a fusion reads of operands that it slices."""
  result = {}
  for parameter in inside.values():
    if parameter.opcode != 'parameter':
      continue
    users = [j for j in inside.values() if parameter.name in j.operands]
    total = 0
    for user in users:
      sliced = user.operands.index(parameter.name) == 0
      if user.opcode in ('dynamic-slice', 'slice') and sliced:
        total += user.shapes[0].padded_bytes
      elif user.opcode == 'dynamic-update-slice' and sliced:
        total += 0  # written in place
      else:
        break
    else:
      result[int(parameter.inside)] = total
  return result


def _collectives(
  i: _Instruction,
  kind: str,
  computation: _Computation,
  times: int,
  mesh: jax.sharding.Mesh,
) -> list[Collective]:
  operands = [s for shapes in _operand_shapes(i, computation) for s in shapes]
  arrays = operands
  if kind == 'all-gather':
    # A start's tuple holds operands, then results.
    arrays = i.shapes[len(operands) :] if 'start' in i.opcode else i.shapes
  group = _group(i.rest, mesh)
  places = np.array(np.unravel_index(group, mesh.devices.shape))
  axes = tuple(
    name
    for name, along in zip(mesh.axis_names, places, strict=True)
    if len(set(along.tolist())) > 1
  )
  name = re.search(r'op_name="([^"]*)"', i.rest)
  return [
    Collective(
      kind,
      axes,
      len(group),
      times,
      array.elements,
      array.bytes,
      name[1] if name else i.name,
    )
    for array in arrays
  ]


def _group(rest: str, mesh: jax.sharding.Mesh) -> list[int]:
  """Returns the first group of devices, as places on the flattened mesh."""
  if pairs := re.search(r'source_target_pairs=\{\{(\d+),(\d+)\}', rest):
    return [int(pairs[1]), int(pairs[2])]
  if groups := re.search(r'replica_groups=\{\{([\d,]+)\}', rest):
    return [int(device) for device in groups[1].split(',')]
  if iota := re.search(
    r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', rest
  ):
    shape, dims, order = (_ints(part) for part in iota.groups())
    devices = np.arange(math.prod(dims)).reshape(dims)
    if order:
      devices = devices.transpose(order)
    return devices.reshape(shape)[0].tolist()
  if named := re.search(
    r'replica_groups=mesh\[([^\]]*)\]'
    r'(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}',
    rest,
  ):
    axes, dims, order, along = named.groups()
    names, sizes = zip(*re.findall(r"'(\w+)'=(\d+)", axes), strict=True)
    devices = np.arange(mesh.size).reshape(_ints(dims) or [mesh.size])
    if order:
      devices = devices.transpose(_ints(order))
    places = tuple(
      slice(None) if f"'{name}'" in along.split(',') else 0 for name in names
    )
    devices = devices.reshape([int(size) for size in sizes])[places]
    return np.ravel(devices).tolist()
  return list(range(mesh.size))  # as far as can be seen


def _ints(text: str | None) -> list[int]:
  return [int(part) for part in (text or '').split(',') if part]
