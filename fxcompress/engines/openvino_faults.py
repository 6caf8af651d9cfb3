"""Faults of OpenVINO's CPU kernels (seen in 2026.4) that a file can be written around."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

_LAYERS = frozenset({"Convolution", "GroupConvolution", "MatMul"})
_PASSING = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze"})
_SCALING = frozenset({"Multiply", "Divide"})

_NEXT_TO_NOTHING = 1e-30
"""Less than the last bit of what it is added to; a bias of 0 would be dropped."""


def give_biases(model: Any) -> None:
    """Gives a bias to layers whose result a quantizer reads and something else reads too.

    Where such a layer computes in integers and has none, the factor that makes real numbers of its sums is put into
    the quantizer's range and stays before the quantizer as well: what it gives is 0, or next to it.
    """
    import openvino
    from openvino import opset13 as ops

    for node in model.get_ops():
        if node.get_type_name() not in _LAYERS or node.get_output_element_type(0) != openvino.Type.f32:
            continue
        port = node.output(0)
        quantizing = {reader == "FakeQuantize" for reader in _readers(port)}
        if quantizing == {True, False}:
            readers, names = port.get_target_inputs(), port.get_names()
            bias = np.full([1] * len(port.get_partial_shape()), _NEXT_TO_NOTHING, np.float32)
            biased = ops.add(port, ops.constant(bias)).output(0)
            port.set_names(set())
            biased.set_names(names)
            for reader in readers:
                reader.replace_source_output(biased)


def _readers(port: Any) -> Iterator[str]:
    """Types of what reads a value, be it in another shape or times a constant."""
    for target in port.get_target_inputs():
        node = target.get_node()
        kind = node.get_type_name()
        if kind in _PASSING or (kind in _SCALING and _by_constant(node)):
            yield from _readers(node.output(0))
        else:
            yield kind


def _by_constant(node: Any) -> bool:
    return any(node.input_value(index).get_node().get_type_name() == "Constant" for index in (0, 1))
