"""Probes: heads that are trained on the stored features of a frozen model."""
