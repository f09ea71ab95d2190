"""Diving48: 48 kinds of dives."""
