"""Counts of work in HLO text, compared with counts by hand."""

import jax
import numpy as np
import pytest

from dualformer_jax.distributed import sharding
from dualformer_jax.planning import program

# Three iterations of a loop, each with a product of [4, 8] by [8, 16] that is
# summed over devices, in a program for 2 x 4 x 1 devices.
LOOP = """HloModule jit_f, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (state: (s32[], f32[4,8], f32[8,16])) -> (s32[], f32[4,8], f32[8,16]) {
  %state = (s32[], f32[4,8]{1,0}, f32[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[4,8]{1,0} get-tuple-element(%state), index=1
  %y = f32[8,16]{1,0} get-tuple-element(%state), index=2
  %p = f32[4,16]{1,0} dot(%x, %y), lhs_contracting_dims={1}, \
rhs_contracting_dims={0}
  %r = f32[4,16]{1,0} all-reduce(%p), \
replica_groups=GROUPS, use_global_device_ids=true, \
to_apply=%add, metadata={op_name="jit(f)/sum"}
  ROOT %out = (s32[], f32[4,8]{1,0}, f32[8,16]{1,0}) tuple(%i, %x, %y)
}

%condition (state: (s32[], f32[4,8], f32[8,16])) -> pred[] {
  %state = (s32[], f32[4,8]{1,0}, f32[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %limit = s32[]{:T(128)} constant(3)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (x: f32[4,8], y: f32[8,16]) -> (s32[], f32[4,8], f32[8,16]) {
  %x = f32[4,8]{1,0} parameter(0)
  %y = f32[8,16]{1,0:T(8,128)S(1)} parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], f32[4,8]{1,0}, f32[8,16]{1,0}) tuple(%zero, %x, %y)
  ROOT %loop = (s32[], f32[4,8]{1,0}, f32[8,16]{1,0}) while(%start), \
condition=%condition, body=%bodyKNOWN
}
"""


def mesh() -> jax.sharding.Mesh:
  """Returns a mesh of 2 x 4 x 1 devices."""
  devices = np.full((2, 4, 1), jax.devices('cpu')[0])
  return jax.sharding.Mesh(devices, sharding.AXES)


def entry(*lines: str) -> str:
  """Returns a program with these instructions."""
  body = '\n'.join(f'  {line}' for line in lines)
  return (
    f'HloModule jit_f\n\nENTRY %main (x: f32[1]) -> f32[1] {{\n{body}\n}}\n'
  )


@pytest.mark.parametrize(
  ('groups', 'axes', 'devices'),
  [
    ('{{0,4},{1,5},{2,6},{3,7}}', ('data',), 2),
    ('{{0,1,2,3},{4,5,6,7}}', ('fsdp',), 4),
    ('[2,4]<=[8]', ('fsdp',), 4),
    ('[4,2]<=[2,4]T(1,0)', ('data',), 2),
    ('[1,8]<=[8]', ('data', 'fsdp'), 8),
    ("mesh['a'=2,'b'=4] {'b'}", ('fsdp',), 4),
    ("mesh['a'=2,'b'=1,'c'=4] {'a'}", ('data',), 2),
    ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", ('data',), 2),
    ("mesh['a'=8,'b'=1] {'a','b'}", ('data', 'fsdp'), 8),
  ],
)
def test_loop_body_counts_once_per_iteration(groups, axes, devices):
  text = LOOP.replace('GROUPS', groups).replace('KNOWN', '')
  found = program.read(text, mesh())
  assert found.flops == 3 * 2 * 4 * 8 * 16
  assert found.unknown_loops == 0
  [collective] = found.collectives
  assert collective.kind == 'all-reduce'
  assert (collective.axes, collective.devices) == (axes, devices)
  assert (collective.count, collective.elements, collective.bytes) == (
    3,
    64,
    256,
  )
  assert collective.name == 'jit(f)/sum'
  # A ring sends all but one shard, once to reduce and once to gather.
  assert collective.bytes_sent() == 3 * 2 * 256 * (devices - 1) / devices
  # Reads x, y and writes p; reads p and writes r.
  assert found.bytes_accessed == 3 * (4 * (32 + 128 + 64) + 4 * (64 + 64))


def test_known_trip_count_of_loop_is_used():
  known = ', backend_config={"known_trip_count":{"n":"5"}}'
  text = LOOP.replace('GROUPS', '[1,8]<=[8]')
  found = program.read(text.replace('KNOWN', known), mesh())
  assert found.flops == 5 * 2 * 4 * 8 * 16
  unknown = text.replace('KNOWN', '').replace('constant(3)', 'parameter(1)')
  found = program.read(unknown, mesh())
  assert (found.flops, found.unknown_loops) == (2 * 4 * 8 * 16, 1)


def test_kernels_count_their_estimate_and_slices_their_output():
  text = entry(
    '%x = bf16[8,4]{1,0} parameter(0)',
    '%y = bf16[8,4]{1,0} custom-call(%x), custom_call_target="kernel", '
    'backend_config={"cost_estimate":{"flops":"123","transcendentals":"4"}}',
    '%s = ((bf16[8,4]{1,0}), bf16[2,4]{1,0:S(1)}, s32[]{:S(2)}) '
    'slice-start(%y), slice={[0:2], [0:4]}',
    'ROOT %d = bf16[2,4]{1,0:S(1)} slice-done(%s)',
  )
  found = program.read(text, mesh())
  assert found.flops == 123
  # The kernel reads and writes an array; the slice is read from memory and
  # written to on-chip memory.
  assert found.bytes_accessed == 2 * (2 * 32) + 2 * 8


def test_kernels_for_gpus_count_their_estimate():
  text = entry(
    'ROOT %y = bf16[8,4]{1,0} custom-call(), custom_call_target="kernel", '
    'backend_config={cost_estimate_json = "{\\22flops\\22: 123, '
    '\\22transcendentals\\22: 4}", name = "kernel"}',
  )
  assert program.read(text, mesh()).flops == 123


def test_on_chip_memory_is_not_counted():
  text = entry(
    '%x = bf16[8,4]{1,0} parameter(0)',
    '%y = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} copy(%x)',
    'ROOT %z = bf16[8,4]{1,0} copy(%y)',
  )
  assert program.read(text, mesh()).bytes_accessed == 2 * (2 * 32)


def test_operand_used_twice_is_read_once():
  text = entry(
    '%x = bf16[8,4]{1,0} parameter(0)',
    'ROOT %y = bf16[8,4]{1,0} multiply(%x, %x)',
  )
  assert program.read(text, mesh()).bytes_accessed == 2 * (2 * 32)


def test_fusion_reads_only_the_slice():
  text = """HloModule jit_f

%fused (p: f32[64,8], i: s32[]) -> f32[8] {
  %p = f32[64,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %s = f32[1,8]{1,0} dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={1,8}
  ROOT %r = f32[8]{0} bitcast(%s)
}

ENTRY %main (p: f32[64,8], i: s32[]) -> f32[8] {
  %p = f32[64,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %f = f32[8]{0} fusion(%p, %i), kind=kLoop, calls=%fused
}
"""
  assert program.read(text, mesh()).bytes_accessed == 4 * (8 + 1 + 8)


@pytest.mark.parametrize(
  ('left', 'right', 'out', 'attributes', 'products'),
  [
    # A product of [6, 8] by [8, 5].
    ('6,8', '8,5', '6,5', 'dim_labels=bf_io->bf', 6 * 8 * 5),
    # Two such products, as a dilated spatial dimension.
    (
      '6,8,2',
      '8,5,2',
      '6,5,2',
      'window={size=2 stride=1 pad=0_0 lhs_dilate=2}, dim_labels=bf0_io0->bf0',
      2 * 6 * 8 * 5,
    ),
    # A kernel of 3 over 4 padded values: 2 + 3 + 3 + 2 valid products.
    (
      '1,7,4',
      '7,5,3',
      '1,5,4',
      'window={size=3 pad=1_1}, dim_labels=bf0_io0->bf0',
      (2 + 3 + 3 + 2) * 7 * 5,
    ),
    # Depthwise, 7 channels.
    (
      '2,7,4',
      '1,7,2',
      '2,7,2',
      'window={size=2 stride=2}, dim_labels=bf0_io0->bf0, '
      'feature_group_count=7',
      2 * 2 * 2 * 7,
    ),
  ],
)
def test_convolution_counts_no_products_with_padding(
  left, right, out, attributes, products
):
  text = entry(
    f'%x = bf16[{left}]{{0}} parameter(0)',
    f'%y = bf16[{right}]{{0}} parameter(1)',
    f'ROOT %c = bf16[{out}]{{0}} convolution(%x, %y), {attributes}',
  )
  assert program.read(text, mesh()).flops == 2 * products


def test_gathers_and_scatters_count_the_larger_side():
  text = """HloModule jit_f

%scatter (p: f32[32]) -> f32[8] {
  %p = f32[32]{0} parameter(0)
  %r = f32[32]{0} all-reduce(%p), replica_groups=[2,4]<=[8], to_apply=%add
  %zero = s32[] constant(0)
  ROOT %s = f32[8]{0} dynamic-slice(%r, %zero), dynamic_slice_sizes={8}
}

ENTRY %main (x: f32[8], y: bf16[6]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %y = bf16[6]{0} parameter(1)
  %g = (f32[32]{0}, bf16[24]{0}) all-gather(%x, %y), \
replica_groups=[2,4]<=[8], dimensions={0}
  %s = ((f32[8]{0}), f32[32]{0}) all-gather-start(%x), \
replica_groups=[2,4]<=[8], dimensions={0}
  %d = f32[32]{0} all-gather-done(%s)
  ROOT %f = f32[8]{0} fusion(%d), kind=kCustom, calls=%scatter
}
"""
  found = program.read(text, mesh())
  assert [(c.kind, c.elements, c.bytes, c.axes) for c in found.collectives] == [
    ('all-gather', 32, 128, ('fsdp',)),
    ('all-gather', 24, 48, ('fsdp',)),
    ('all-gather', 32, 128, ('fsdp',)),
    ('reduce-scatter', 32, 128, ('fsdp',)),
  ]
  assert found.collectives[-1].bytes_sent() == 128 * 3 / 4
