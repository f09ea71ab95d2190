"""Kinetics-400: clips of ten seconds from YouTube, 400 human actions."""

from dualformer_jax.input_pipeline.preparing import kinetics


class Builder(kinetics.KineticsBuilder):
  """Builds Kinetics-400; labels.txt has the class names, by label."""
