"""Meshes, sharding rules, and runs of several processes."""
