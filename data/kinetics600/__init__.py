"""Kinetics-600: clips of ten seconds from YouTube, 600 human actions."""
