"""Eight classes of small videos that only motion tells apart."""
