"""Counts the work of a compiled program on each device: FLOPs, bytes, sends.

Unlike XLA's cost analysis, it counts the body of a loop as often as it runs,
and attributes collectives to axes of the mesh.
"""

import dataclasses
import functools
import math
import re

import jax
import numpy as np

from dualformer_jax.planning import hlo

_COLLECTIVE = re.compile(
  '(all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|'
  'collective-broadcast|collective-permute)(-start)?'
)
# Of Pallas kernels for TPUs, and for GPUs as a string with escaped quotes.
_COST_ESTIMATE = re.compile(
  r'cost_estimate(?:":|_json = ")\{(?:"|\\22)flops(?:"|\\22): ?"?(\d+)'
)
# Instructions without traffic, or whose traffic is counted elsewhere.
_FREE = re.compile(
  'parameter|constant|tuple|get-tuple-element|bitcast|while|call|conditional|'
  'after-all|partition-id|replica-id|opt-barrier|.*-done'
)


@dataclasses.dataclass(frozen=True)
class Collective:
  """An array that groups of devices exchange `count` times per step.

  Attributes:
    axes: Mesh axes along which the devices of a group are.
    devices: Devices in one group.
    elements: Number of elements of the larger side: the output of an
      all-gather, the input of a reduce-scatter.
    bytes: Size of the larger side.
    name: JAX operation that it was compiled from.
  """

  kind: str
  axes: tuple[str, ...]
  devices: int
  count: int
  elements: int
  bytes: int
  name: str

  def bytes_sent(self) -> float:
    """Returns the bytes that each device sends per step, in a ring."""
    rounds = 2 if self.kind == 'all-reduce' else 1
    share = 1.0
    if self.kind in ('all-reduce', 'all-gather', 'reduce-scatter'):
      share = (self.devices - 1) / self.devices
    return self.count * rounds * share * self.bytes


@dataclasses.dataclass(frozen=True)
class Program:
  """Work of one device in one step.

  Attributes:
    flops: Floating-point operations of matrix products, two per multiply-add.
    bytes_accessed: Bytes read from and written to memory, padding of layouts
      included. Each instruction reads every operand once.
    unknown_loops: Loops without a known trip count, counted as one iteration.
    traffic: Bytes accessed and number of instructions by operation of the
      model, such as 'backward blocks_2/mlp/fc1/dot_general'.
  """

  flops: int
  bytes_accessed: int
  collectives: tuple[Collective, ...]
  unknown_loops: int
  traffic: dict[str, tuple[int, int]]


def read(text: str, mesh: jax.sharding.Mesh) -> Program:
  """Counts the work of a program (Compiled.as_text()) compiled for a mesh."""
  module = hlo.parse(text)
  flops = bytes_accessed = unknown_loops = 0
  collectives = []
  traffic: dict[str, tuple[int, int]] = {}
  for i, count, fused in module.executions():
    flops += count * count_flops(i)
    if fused is None and (accessed := count * count_bytes(i, module)):
      bytes_accessed += accessed
      operation = _operation(i)
      total, instructions = traffic.get(operation, (0, 0))
      traffic[operation] = total + accessed, instructions + count
    if i.opcode == 'while' and not module.trip_count(i):
      unknown_loops += 1
    if _COLLECTIVE.fullmatch(i.opcode):
      collectives += _collectives(i, count, fused, mesh)
  return Program(
    flops, bytes_accessed, tuple(collectives), unknown_loops, traffic
  )


def _operation(i: hlo.Instruction) -> str:
  """Returns the pass, module and JAX operation of an instruction.

  The blocks of a stage count as one module.
  """
  found = re.search(r'op_name="([^"]*)"', i.attributes)
  path = found[1] if found else ''
  direction = 'backward' if 'transpose(' in path else 'forward'
  # Scopes are wrapped in the transformations: transpose(jvp(blocks_2_1)).
  path = re.sub(r'\b(?:jit|jvp|transpose|vmap)\(|\)', '', path)
  path = re.sub(r'\bblocks_(\d+)_\d+', r'blocks_\1', path)
  if (start := path.rfind('blocks_')) >= 0:
    operation = path[start:]
  else:
    operation = '/'.join(path.split('/')[-3:]) or i.opcode
  return f'{direction} {operation}'


def count_flops(i: hlo.Instruction) -> int:
  """Returns the FLOPs of one matrix product, convolution or kernel."""
  match i.opcode:
    case 'dot':
      (left,) = i.operand_shapes[0]
      found = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', i.attributes)
      assert found
      axes = hlo.parse_integers(found[1])
      sizes = (left.dims[axis] for axis in axes)
      return 2 * math.prod(sizes) * i.shapes[0].elements
    case 'convolution':
      return _convolution_flops(i)
    case 'custom-call':  # the estimate that a Pallas kernel declares
      found = _COST_ESTIMATE.search(i.attributes)
      return int(found[1]) if found else 0
  return 0


def _convolution_flops(i: hlo.Instruction) -> int:
  """Counts products of two input values, without those with padding.

  XLA for TPUs turns batched matrix products into convolutions, with batch
  dimensions as dilated spatial ones: most of their products are with padding.
  """
  left, right = (shapes[0].dims for shapes in i.operand_shapes)
  out = i.shapes[0].dims
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', i.attributes)
  assert labels
  found = re.search(r'window=\{([^}]*)\}', i.attributes)
  window = dict(re.findall(r'(\w+)=([\dx_-]+)', found[1]) if found else [])
  products = out[labels[3].index('b')] * out[labels[3].index('f')]
  products *= right[labels[2].index('i')]
  for axis in range(len(labels[1]) - 2):
    sizes = (
      dims[label.index(str(axis))]
      for label, dims in zip(labels.groups(), (left, right, out), strict=True)
    )
    option = {name: value.split('x')[axis] for name, value in window.items()}
    products *= _valid_products(
      *sizes,
      stride=int(option.get('stride', 1)),
      padding=int(option.get('pad', '0_0').split('_')[0]),
      dilation=int(option.get('lhs_dilate', 1)),
      kernel_dilation=int(option.get('rhs_dilate', 1)),
    )
  return 2 * products


@functools.cache
def _valid_products(
  size: int,
  kernel: int,
  output: int,
  stride: int,
  padding: int,
  dilation: int,
  kernel_dilation: int,
) -> int:
  """Returns the pairs of output and kernel positions that meet an input."""
  outputs, taps = np.ogrid[:output, :kernel]
  position = outputs * stride - padding + taps * kernel_dilation
  is_inside = (position >= 0) & (position <= (size - 1) * dilation)
  return int((is_inside & (position % dilation == 0)).sum())


def count_bytes(i: hlo.Instruction, module: hlo.Module) -> int:
  """Returns the bytes that an instruction reads from and writes to memory."""
  if _FREE.fullmatch(i.opcode) or 'AllocateBuffer' in i.attributes:
    return 0
  if i.opcode in ('slice-start', 'dynamic-slice-start'):
    # The output tuple is the operands, then the slice of the first operand.
    result, source = i.shapes[len(i.operands)], i.operand_shapes[0][0]
    return result.padded_bytes * (result.in_memory + source.in_memory)
  # The output tuple of other asynchronous instructions repeats the operands.
  outputs = i.shapes[:1] if i.opcode.endswith('-start') else i.shapes
  written = _memory_bytes(outputs)
  if i.opcode in ('dynamic-slice', 'slice', 'gather'):
    return 2 * written
  if i.opcode == 'dynamic-update-slice':  # in place
    return 2 * i.operand_shapes[1][0].padded_bytes if written else 0
  sliced = {}
  if i.opcode == 'fusion':
    fused = module.computations[i.attribute('calls')]
    sliced = _sliced_bytes(fused)
    root = next((j for j in fused.values() if j.is_root), None)
    if root and root.opcode == 'dynamic-update-slice' and written:
      written = root.operand_shapes[1][0].padded_bytes
  read: dict[str, int] = {}  # by name: x * x reads x once
  for index, (name, shapes) in enumerate(
    zip(i.operands, i.operand_shapes, strict=True)
  ):
    whole = _memory_bytes(shapes)
    read[name] = min(whole, read.get(name, 0) + sliced.get(index, whole))
  return sum(read.values()) + written


def _memory_bytes(shapes: tuple[hlo.Shape, ...]) -> int:
  return sum(shape.padded_bytes for shape in shapes if shape.in_memory)


def _sliced_bytes(fused: hlo.Computation) -> dict[int, int]:
  """Returns the bytes read of each operand that a fusion only slices."""
  result = {}
  for parameter in fused.values():
    if parameter.opcode != 'parameter':
      continue
    total = 0
    for user in fused.values():
      if parameter.name not in user.operands:
        continue
      is_source = user.operands.index(parameter.name) == 0
      if user.opcode in ('dynamic-slice', 'slice') and is_source:
        total += user.shapes[0].padded_bytes
      elif not (user.opcode == 'dynamic-update-slice' and is_source):
        break  # reads all of it
    else:
      result[int(parameter.arguments)] = total
  return result


def _collectives(
  i: hlo.Instruction,
  count: int,
  fused: hlo.Computation | None,
  mesh: jax.sharding.Mesh,
) -> list[Collective]:
  """Returns a Collective for each array of an instruction."""
  kind = i.opcode.removesuffix('-start')
  # On TPUs, a reduce-scatter is a fusion of an all-reduce and a slice.
  opcodes = {j.opcode for j in (fused or {}).values()}
  if kind == 'all-reduce' and 'dynamic-slice' in opcodes:
    kind = 'reduce-scatter'
  arrays = [shape for shapes in i.operand_shapes for shape in shapes]
  if kind == 'all-gather':
    # The output tuple of a start is the operands, then the results.
    is_start = i.opcode.endswith('-start')
    arrays = i.shapes[len(arrays) :] if is_start else i.shapes
  group = _first_group(i.attributes, mesh)
  coordinates = np.unravel_index(group, mesh.devices.shape)
  axes = tuple(
    name
    for name, along in zip(mesh.axis_names, coordinates, strict=True)
    if len(set(along.tolist())) > 1
  )
  name = re.search(r'op_name="([^"]*)"', i.attributes)
  name = name[1] if name else i.name
  common = kind, axes, len(group), count
  return [Collective(*common, a.elements, a.bytes, name) for a in arrays]


def _first_group(attributes: str, mesh: jax.sharding.Mesh) -> list[int]:
  """Returns the first group of devices, as indices into the flattened mesh."""
  if pair := re.search(r'source_target_pairs=\{\{(\d+,\d+)\}', attributes):
    return list(hlo.parse_integers(pair[1]))
  if listed := re.search(r'replica_groups=\{\{([\d,]+)\}', attributes):
    return list(hlo.parse_integers(listed[1]))
  if iota := re.search(
    r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', attributes
  ):
    shape, dims, order = (hlo.parse_integers(part) for part in iota.groups())
    return _iota(dims, order).reshape(shape)[0].tolist()
  if named := re.search(
    r'replica_groups=mesh\[([^\]]*)\]'
    r'(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}',
    attributes,
  ):
    axes, dims, order, along = named.groups()
    names, sizes = zip(*re.findall(r"'(\w+)'=(\d+)", axes), strict=True)
    devices = _iota(
      hlo.parse_integers(dims) or (mesh.size,), hlo.parse_integers(order)
    ).reshape([int(size) for size in sizes])
    index = tuple(
      slice(None) if f"'{name}'" in along.split(',') else 0 for name in names
    )
    return np.ravel(devices[index]).tolist()
  return list(range(mesh.size))  # no groups: all devices


def _iota(dims: tuple[int, ...], order: tuple[int, ...]) -> np.ndarray:
  """Returns device numbers of a shape, with its dimensions transposed."""
  devices = np.arange(math.prod(dims)).reshape(dims)
  return devices.transpose(order) if order else devices
