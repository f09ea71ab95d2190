"""Kinetics-400: clips of ten seconds from YouTube, 400 human actions."""
