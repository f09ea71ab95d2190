"""Kinetics-400: ten seconds of YouTube videos, 400 human actions."""
