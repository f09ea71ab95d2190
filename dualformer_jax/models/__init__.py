"""The architecture of DualFormer, as Flax modules."""
