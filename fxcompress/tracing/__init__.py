"""Tracing: any PyTorch model to a Program in normal form."""

from fxcompress.tracing.islands import PartialProgram, trace_islands
from fxcompress.tracing.tracer import trace

__all__ = ["PartialProgram", "trace", "trace_islands"]
