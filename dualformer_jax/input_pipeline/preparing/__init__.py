"""Shared code of the dataset builders in data/."""
