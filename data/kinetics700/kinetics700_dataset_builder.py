"""Kinetics-700: clips of ten seconds from YouTube, 700 human actions."""

from dualformer_jax.input_pipeline.preparing import kinetics


class Builder(kinetics.KineticsBuilder):
  """Builds Kinetics-700; labels.txt has the class names, by label."""
