"""Jester: 27 gestures in front of a webcam."""
