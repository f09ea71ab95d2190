"""Something-Something V1: 174 actions with objects."""

from dualformer_jax.input_pipeline.preparing import twentybn


class Builder(twentybn.TwentyBnBuilder):
  """Builds Something-Something V1."""

  PREFIX = 'something-something-v1'
