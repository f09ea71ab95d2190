"""FLOPs of training, compared with counts by hand."""

import pytest

from dualformer_jax.models.dualformer import DualFormer
from dualformer_jax.planning import costs


@pytest.mark.parametrize(
  ('remat', 'recomputed'), [('none', 0), ('elementwise', 0), ('block', 1)]
)
def test_training_flops_agree_with_count_by_hand(remat, recomputed):
  """One stage, one block: 2 x 2 x 2 tokens of 6 channels in one window."""
  model = DualFormer(
    depths=(1,),
    embed_dims=(6,),
    num_heads=(2,),
    num_classes=5,
    num_frames=4,
    image_size=8,
    fine_sizes=((8, 7, 7),),
    coarse_sizes=(None,),
    remat=remat,
  )
  patches = 8 * (2 * 4 * 4 * 3) * 6  # without a gradient of the pixels
  linear = 8 * 6 * (3 * 6 + 6 + 4 * 6)  # qkv, proj, fc1
  fc2 = 8 * 6 * 4 * 6  # its output is never recomputed
  attention = 2 * 8 * 8 * 6  # half of it, the scores, is always recomputed
  head = 6 * 5
  assert costs.training_flops(model) == 2 * (
    2 * patches
    + (3 + recomputed) * linear
    + 3 * fc2
    + (3.5 + recomputed) * attention
    + 3 * head
  )
