"""A quantized Program beside itself in floating point, on calibration batches."""

from __future__ import annotations

from typing import Any

import torch
from fxcompress.passes.calibrated.streams import Streams
from fxcompress.passes.quantization.layers import Floating, QuantizedLayer, is_qdq
from torch import fx

from fxcompress.ir.program import Program


def quantized_streams(program: Program, batches: list[list[Any]]) -> Streams:
    """The values of all batches without Q/DQ nodes, with the weights as they are now, and with them."""
    original, root = program.copy().graph_module, program.graph_module
    return Streams(lambda: Floating(original), lambda: fx.Interpreter(root), is_qdq, batches)


def mean_error(streams: Streams, layer: QuantizedLayer) -> torch.Tensor:
    """How much each output channel of the layer at hand is too small in the mean over all batches and places."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for before, after in streams.outputs(layer.layer.node):
        channel = layer.layer.layout.channel_dim(before.dim())
        error = (before - after).movedim(channel, 0).flatten(1)
        total = total + error.double().sum(1)
        count += error.shape[1]
    return total / max(count, 1)
