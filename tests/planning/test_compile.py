"""Programs compiled ahead of time, and the purposes of their collectives."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import motion
from dualformer_jax.distributed import sharding
from dualformer_jax.errors import UserError
from dualformer_jax.planning import chips, compile, costs, program
from dualformer_jax.training import setup

# Programs for devices that are not attached cannot be read from the cache, and
# are compiled again.
pytestmark = pytest.mark.filterwarnings(
  'ignore:Error reading persistent compilation cache entry'
)


@pytest.mark.parametrize(
  ('topology', 'message'),
  [
    ('v9:2x2', r'expected a TPU \(v4, v5e, v5p or v6e\)'),
    ('h100', r'or a GPU \(a100, h100, h200 or b200\)'),
    ('h100:12', 'expected 1 to 8 GPUs, or a multiple of 8'),
    ('h100:2x4', 'expected 1 to 8 GPUs, or a multiple of 8'),
  ],
)
def test_invalid_topology_raises(topology, message):
  with pytest.raises(UserError, match=message):
    chips.find_target(topology)


@pytest.mark.parametrize(
  ('topology', 'data'), [('v6e:4x4', 4), ('v4:2x2x4', 4), ('v5p:4x4x4', 16)]
)
def test_mesh_axes_can_split_slice_axes(tpu_target, topology, data):
  target = tpu_target(topology)
  mesh = sharding.make_mesh(
    {'data': -1, 'fsdp': 2, 'tensor': 2}, 64, 1, target.devices
  )
  assert dict(mesh.shape) == {'data': data, 'fsdp': 2, 'tensor': 2}
  assert set(mesh.devices.flat) == set(target.devices)


@pytest.mark.slow
@pytest.mark.parametrize('with_options', [False, True])
def test_compiler_options_gather_weights_before_use(tpu_target, with_options):
  mesh = sharding.make_mesh(
    {'data': 1, 'fsdp': -1, 'tensor': 1},
    16,
    devices=tpu_target('v5e:4x4').devices,
  )
  tokens, channels, hidden = 16 * 4096, 512, 2048
  sharded = {'kernel': jax.NamedSharding(mesh, jax.P(None, 'fsdp'))}

  def loss(params, x):
    kernel = sharding.all_gather_params(mesh)(params)['kernel']
    return jnp.sum(jnp.square(x @ kernel.astype(x.dtype)), dtype=jnp.float32)

  params = {
    'kernel': jax.ShapeDtypeStruct(
      (channels, hidden), jnp.float32, sharding=sharded['kernel']
    )
  }
  x = jax.ShapeDtypeStruct(
    (tokens, channels),
    jnp.bfloat16,
    sharding=jax.NamedSharding(mesh, sharding.BATCH),
  )
  options = sharding.compiler_options(mesh) if with_options else {}
  gradient = jax.jit(
    jax.grad(loss), out_shardings=sharded, compiler_options=options
  )
  with jax.set_mesh(mesh):
    compiled = gradient.lower(params, x).compile()
  work = program.read(compiled.as_text() or '', mesh)
  kinds = {collective.kind for collective in work.collectives}
  # The product and the gradient of the kernel.
  flops = 2 * 2 * tokens // 16 * channels * hidden
  if with_options:
    assert kinds == {'all-gather', 'all-reduce'}
    assert work.flops == flops
  else:  # if this fails, the compiler no longer needs the option
    assert 'collective-permute' in kinds
    assert work.flops > 1.2 * flops


@pytest.mark.parametrize(
  ('shape', 'dtype', 'row'),
  [
    ((8, 56, 56, 64), jnp.bfloat16, 128),
    ((8, 56, 56, 96), jnp.float32, 128),
    ((8, 56, 56, 192), jnp.bfloat16, 256),
  ],
)
def test_bytes_accessed_include_padding(tpu_target, shape, dtype, row):
  mesh = jax.sharding.Mesh(tpu_target('v5e:2x2').devices[:1], ('data',))
  where = jax.NamedSharding(mesh, jax.P())
  x = jax.ShapeDtypeStruct(shape, dtype, sharding=where)
  compiled = jax.jit(lambda x: x + 1).lower(x).compile()
  padded = 8 * 56 * 56 * row * jnp.dtype(dtype).itemsize
  work = program.read(compiled.as_text() or '', mesh)
  assert work.bytes_accessed == 2 * padded
  costs: Any = compiled.cost_analysis()
  assert costs['bytes accessed'] == 2 * padded


@pytest.mark.slow
def test_step_with_token_labels_is_compiled(one_device, monkeypatch):
  one_stage: dict[str, Any] = dict(
    depths=(1,),
    num_heads=(2,),
    fine_sizes=((8, 4, 4),),
    coarse_sizes=(None,),
  )
  # The default teacher, which is much larger.
  teacher = one_stage | {'embed_dims': (64,)}
  monkeypatch.setattr(compile.variants, 'BASE', teacher)
  config: Any = motion.get_config()
  config.model.update(one_stage, embed_dims=(16,), token_label=True)
  config.batch_size = 2
  settings = compile.Settings.from_config(config, one_device)
  plan = compile.compile_step(config, settings, one_device)
  assert plan.work is not None
  assert plan.work.flops == pytest.approx(plan.model_flops, rel=0.05)
  assert compile.UNEXPECTED not in plan.purposes
  config.model.token_label = False
  alone = config.batch_size * costs.training_flops(setup.make_model(config))
  assert plan.model_flops > 3 * alone


@pytest.mark.parametrize(
  ('kind', 'axes', 'elements', 'count', 'expected'),
  [
    ('all-reduce', ('data',), 64, 2, compile.GRADIENTS),
    ('reduce-scatter', ('fsdp',), 64, 2, compile.GRADIENTS),
    ('all-gather', ('fsdp',), 64, 1, compile.PARAMETERS),
    ('all-reduce', ('tensor',), 10**7, 1, compile.PARTIAL_SUMS),
    ('all-reduce', ('data',), 49, 1, compile.STATISTICS),
    ('all-gather', ('fsdp',), 49 * 2**18, 1, compile.UNEXPECTED),
    ('all-gather', ('data',), 49 * 2**10, 2**8, compile.UNEXPECTED),
    ('all-to-all', ('tensor',), 49 * 2**18, 1, compile.UNEXPECTED),
  ],
)
def test_gathered_activations_are_unexpected(
  kind, axes, elements, count, expected
):
  collective = program.Collective(
    kind, axes, 4, count, elements, 4 * elements, 'x'
  )
  assert compile.find_purpose(collective, {64, 128}) == expected


def test_gradients_that_are_summed_as_one_array_are_gradients():
  name = 'train_step/transpose(jvp(Model))/(blocks_0/psum:blocks_1/psum)'
  for kind, expected in (
    ('all-reduce', compile.GRADIENTS),
    ('all-gather', compile.UNEXPECTED),
  ):
    collective = program.Collective(kind, ('data',), 8, 1, 10**7, 10**7, name)
    assert compile.find_purpose(collective, {64}) == expected


def test_settings_do_not_change_the_config(one_device):
  config: Any = motion.get_config()
  settings = compile.Settings(1, 1, 1, 2, 'block')
  changed = settings.apply(config)
  assert (changed.accumulation_steps, changed.model.remat) == (2, 'block')
  assert config == motion.get_config()
  assert compile.Settings.from_config(changed, one_device) == settings
  assert np.prod([changed.mesh[axis] for axis in sharding.AXES]) == 1
