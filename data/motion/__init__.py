"""Eight classes of small videos that differ only in motion."""
