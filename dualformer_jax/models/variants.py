"""The published sizes of DualFormer (table 1 of arXiv 2112.04674)."""

TINY = {
  'depths': (2, 2, 10, 4),
  'embed_dims': (64, 128, 256, 512),
  'num_heads': (2, 4, 8, 16),
}
SMALL = {
  'depths': (2, 2, 18, 2),
  'embed_dims': (96, 192, 384, 768),
  'num_heads': (3, 6, 12, 24),
}
BASE = {
  'depths': (2, 2, 18, 2),
  'embed_dims': (128, 256, 512, 1024),
  'num_heads': (4, 8, 16, 32),
}
