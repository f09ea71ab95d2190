"""Kinetics-700: clips of ten seconds from YouTube, 700 human actions."""
