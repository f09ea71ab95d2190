"""Kinetics-600: ten seconds of YouTube videos, 600 human actions."""
