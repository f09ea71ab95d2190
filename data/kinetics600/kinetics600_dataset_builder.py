"""Kinetics-600: clips of ten seconds from YouTube, 600 human actions."""

from dualformer_jax.input_pipeline.preparing import kinetics


class Builder(kinetics.KineticsBuilder):
  """Builds Kinetics-600; labels.txt has the class names, by label."""
