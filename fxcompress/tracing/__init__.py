"""Tracing: any PyTorch model to a Program in normal form."""

from fxcompress.tracing.trace import trace

__all__ = ["trace"]
