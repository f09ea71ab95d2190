"""Checkpoint folders, .pth files, and transfer between models."""
