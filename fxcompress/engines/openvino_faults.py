"""Faults of OpenVINO's CPU kernels (seen in 2026.4) that a file can be written around."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

_LAYERS = frozenset({"Convolution", "GroupConvolution", "MatMul"})
_PASSING = frozenset({"Pad", "Reshape", "Transpose", "Squeeze", "Unsqueeze"})
_SCALING = frozenset({"Multiply", "Divide"})

_NEXT_TO_NOTHING = 1e-30
"""Less than the last bit of what it is added to; a bias of 0 would be dropped."""


def give_biases(model: Any) -> None:
    """Gives a bias to layers whose result several read, or a gather reads, in a model with quantizers.

    Where such a layer computes in integers and has none, the factor that makes real numbers of its sums is moved
    behind a reader that lets it pass (a quantizer, a maximum), and stays before it as well: what that gives is 0, or
    next to it. Behind a gather with a table of indices it is moved as if that added no dims, and fits no longer.
    """
    import openvino
    from openvino import opset13 as ops

    nodes = model.get_ops()
    if not any(node.get_type_name() == "FakeQuantize" for node in nodes):
        return
    for node in nodes:
        port = node.output(0) if node.get_type_name() in _LAYERS else None
        if port is not None and port.get_element_type() == openvino.Type.f32 and _is_misread(port):
            readers, names = port.get_target_inputs(), port.get_names()
            bias = np.full([1] * len(port.get_partial_shape()), _NEXT_TO_NOTHING, np.float32)
            biased = ops.add(port, ops.constant(bias)).output(0)
            port.set_names(set())
            biased.set_names(names)
            for reader in readers:
                reader.replace_source_output(biased)


def _is_misread(port: Any) -> bool:
    readers = list(_readers(port))
    return len(readers) > 1 or "Gather" in readers


def _readers(port: Any) -> Iterator[str]:
    """Types of what reads a value, be it padded, in another shape or times a constant."""
    for target in port.get_target_inputs():
        node = target.get_node()
        yield from _readers(node.output(0)) if _passes(node) else [node.get_type_name()]


def _passes(node: Any) -> bool:
    kind, sources = node.get_type_name(), [port.get_node().get_type_name() for port in node.input_values()]
    return kind in _PASSING or (kind in _SCALING and "Constant" in sources)
