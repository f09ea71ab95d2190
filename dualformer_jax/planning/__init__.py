"""Compiles training steps ahead of time and counts what they need."""
