"""Jester: 27 gestures in front of a webcam."""

from dualformer_jax.input_pipeline.preparing import twentybn


class Builder(twentybn.TwentyBnBuilder):
  """Builds Jester."""

  PREFIX = 'jester-v1'
