"""Kinetics-700: ten seconds of YouTube videos, 700 human actions."""
