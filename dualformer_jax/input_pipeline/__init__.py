"""Input pipeline: datasets, decoding, transforms, loaders. No JAX."""
