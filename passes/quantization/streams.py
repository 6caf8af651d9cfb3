"""A quantized Program beside itself in floating point, on calibration batches."""

from __future__ import annotations

from typing import Any

from fxcompress.passes.calibrated.streams import Streams
from fxcompress.passes.quantization.layers import Floating, is_qdq
from torch import fx

from fxcompress.ir.program import Program


def quantized_streams(program: Program, batches: list[list[Any]]) -> Streams:
    """The values of all batches without Q/DQ nodes, with the weights as they are now, and with them."""
    original, root = program.copy().graph_module, program.graph_module
    return Streams(lambda: Floating(original), lambda: fx.Interpreter(root), is_qdq, batches)
