"""Parses the text of a compiled program (HLO)."""

from collections.abc import Iterator
import dataclasses
import itertools
import math
import re

_COMPUTATION = re.compile(r'^(?!HloModule)(?:ENTRY )?%?([\w.-]+) .*\{$')
_INSTRUCTION = re.compile(r'^\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\(')
_SHAPE = re.compile(r'(\w+)\[([\d,]*)\](?:\{([^}]*)\})?')
_TILE = re.compile(r':T\(([\d,]+)\)')
# Attributes with the computations that an instruction runs, besides `calls`.
_CALLED = {
  'while': 'body',
  'call': 'to_apply',
  # All branches: an upper bound.
  'conditional': 'branch_computations|true_computation|false_computation',
}
_BITS = {'pred': 8, 's4': 4, 'u4': 4, 'bf16': 16, 'token': 0, 'opaque': 0}


@dataclasses.dataclass(frozen=True)
class Shape:
  """Shape and layout of an array, in main memory or on-chip memory.

  Attributes:
    minor_to_major: Dimensions from the innermost to the outermost.
    tile: Multiples that the innermost dimensions are padded to; the last one
      is of the innermost dimension.
  """

  dtype: str
  dims: tuple[int, ...]
  in_memory: bool
  minor_to_major: tuple[int, ...]
  tile: tuple[int, ...]

  @property
  def elements(self) -> int:
    """Number of elements, without padding."""
    return math.prod(self.dims)

  @property
  def bytes(self) -> int:
    """Size without padding."""
    bits = _BITS.get(self.dtype)
    if bits is None:
      bits = int(re.findall(r'\d+', self.dtype)[0])  # f32, s8, f8e4m3fn
    return math.ceil(self.elements * bits / 8)

  @property
  def padded_bytes(self) -> int:
    """Size in memory. TPUs pad rows to 128 elements, among others."""
    if not self.elements:
      return 0
    padded = self.bytes
    sizes = itertools.chain(
      (self.dims[axis] for axis in self.minor_to_major), itertools.repeat(1)
    )
    for size, multiple in zip(sizes, reversed(self.tile), strict=False):
      padded = padded * (-(-size // multiple) * multiple) // size
    return padded


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One instruction of a computation.

  Attributes:
    shapes: Shape of the output; several for a tuple.
    arguments: Text between the parentheses.
    attributes: Text after the parentheses.
  """

  name: str
  opcode: str
  shapes: tuple[Shape, ...]
  operands: tuple[str, ...]
  operand_shapes: tuple[tuple[Shape, ...], ...]
  arguments: str
  attributes: str
  is_root: bool

  def attribute(self, name: str) -> str:
    """Returns the value of an attribute such as calls=%name, or ''."""
    found = re.search(rf'\b{name}=%?([^\s,]+)', self.attributes)
    return found[1] if found else ''

  def called_computations(self) -> list[str]:
    """Returns the computations that run (not those applied per element)."""
    name = _CALLED.get(self.opcode, 'calls')
    found = re.findall(rf'\b(?:{name})=(\{{[^}}]*\}}|[^\s,]+)', self.attributes)
    return re.findall(r'[\w.-]+', ' '.join(found))


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Module:
  """A compiled program: its computations by name, and that which runs first."""

  computations: dict[str, Computation]
  entry: str

  def executions(self) -> Iterator[tuple[Instruction, int, Computation | None]]:
    """Yields instructions that run, how often, and what fusion they are in."""

    def visit(name: str, count: int, in_fusion: bool):
      computation = self.computations[name]
      for i in computation.values():
        yield i, count, computation if in_fusion else None
        trips = self.trip_count(i) or 1 if i.opcode == 'while' else 1
        is_fusion = in_fusion or i.opcode == 'fusion'
        for called in i.called_computations():
          yield from visit(called, count * trips, is_fusion)

    return visit(self.entry, 1, False)

  def trip_count(self, loop: Instruction) -> int:
    """Returns the number of iterations of a `while`, or 0 if unknown.

    Unannotated loops count from 0 to the only constant of the condition.
    """
    if known := re.search(r'known_trip_count[^\d]*(\d+)', loop.attributes):
      return int(known[1])
    limits = set()
    pending = [loop.attribute('condition')]
    while pending:
      for i in self.computations[pending.pop()].values():
        if i.opcode == 'constant' and re.fullmatch(r'\d+', i.arguments):
          limits.add(int(i.arguments))
        pending += i.called_computations()
    return limits.pop() if len(limits) == 1 else 0


def parse(text: str) -> Module:
  """Parses a program: the output of jax.stages.Compiled.as_text()."""
  computations: dict[str, Computation] = {}
  entry = ''
  current: Computation = {}
  for line in text.splitlines():
    if found := _COMPUTATION.match(line):
      current = computations[found[1]] = {}
      entry = found[1] if line.startswith('ENTRY') else entry
    found = _INSTRUCTION.match(line)
    if not found:
      continue
    end, depth = found.end(), 1
    while depth and end < len(line):
      depth += {'(': 1, ')': -1}.get(line[end], 0)
      end += 1
    arguments = line[found.end() : end - 1]
    operands = tuple(re.findall(r'%([\w.-]+)', arguments))
    current[found[2]] = Instruction(
      name=found[2],
      opcode=found[4],
      shapes=_parse_shapes(found[3]),
      operands=operands,
      operand_shapes=tuple(current[name].shapes for name in operands),
      arguments=arguments,
      attributes=line[end:],
      is_root=bool(found[1]),
    )
  return Module(computations, entry)


def _parse_shapes(text: str) -> tuple[Shape, ...]:
  return tuple(
    Shape(
      dtype,
      dims=parse_integers(dims),
      in_memory=not re.search(r'S\([1-9]', layout),
      minor_to_major=parse_integers(layout.split(':')[0]),
      tile=parse_integers(''.join(_TILE.findall(layout))),
    )
    for dtype, dims, layout in _SHAPE.findall(text)
  )


def parse_integers(text: str | None) -> tuple[int, ...]:
  """Parses '4,8' as (4, 8); '' and None as ()."""
  return tuple(int(part) for part in (text or '').split(',') if part)
