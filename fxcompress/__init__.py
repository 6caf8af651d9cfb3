"""A compiler that makes neural networks smaller and faster."""
