"""Quantization: what is observed, which values become integers on which engine, and with what scale."""
