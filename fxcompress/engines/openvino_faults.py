"""Faults of OpenVINO's CPU kernels (seen in 2026.4) that a file can be written around."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

_LAYERS = frozenset({"Convolution", "GroupConvolution", "MatMul"})
_PASSING = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze"})
_SCALING = frozenset({"Multiply", "Divide"})

_NEXT_TO_NOTHING = 1e-30
"""Less than the last bit of what it is added to; a bias of 0 would be dropped."""


def write_around(model: Any) -> None:
    """Changes a model with quantizers where OpenVINO would compute something else, or nothing; its outputs stay."""
    if any(node.get_type_name() == "FakeQuantize" for node in model.get_ops()):
        _give_biases(model)
        _flatten_indices(model)


def _give_biases(model: Any) -> None:
    """Gives a bias to layers whose result several read.

    Where such a layer computes in integers and has none, the factor that makes real numbers of its sums is moved
    behind a reader that lets it pass (a quantizer, a maximum), and stays before it as well: what that gives is 0, or
    next to it.
    """
    import openvino
    from openvino import opset13 as ops

    for node in model.get_ops():
        port = node.output(0) if node.get_type_name() in _LAYERS else None
        if port is not None and port.get_element_type() == openvino.Type.f32 and _readers(port) > 1:
            bias = np.full([1] * len(port.get_partial_shape()), _NEXT_TO_NOTHING, np.float32)
            readers = port.get_target_inputs()  # before the sum is one of them
            _replace(port, readers, ops.add(port, ops.constant(bias)).output(0))


def _readers(port: Any) -> int:
    """How many read a value, be it in another shape or times a constant."""
    nodes = [target.get_node() for target in port.get_target_inputs()]
    return sum(_readers(node.output(0)) if _passes(node) else 1 for node in nodes)


def _passes(node: Any) -> bool:
    kind, sources = node.get_type_name(), [port.get_node().get_type_name() for port in node.input_values()]
    return kind in _PASSING or (kind in _SCALING and "Constant" in sources)


def _flatten_indices(model: Any) -> None:
    """Gathers with one row of indices where there is a table of them, and gives the result its shape after.

    The factor of each channel of a layer in integers is moved behind a gather as if that added no dims.
    """
    from openvino import opset13 as ops

    for node in model.get_ops():
        if node.get_type_name() == "Gather" and (shape := _result_shape(node)) is not None:
            values, indices, axis = node.input_values()
            row = ops.reshape(indices, ops.constant(np.array([-1], np.int64)), special_zero=False)
            shaped = ops.reshape(ops.gather(values, row, axis), ops.constant(shape), special_zero=True)
            _replace(node.output(0), node.output(0).get_target_inputs(), shaped.output(0))


def _result_shape(gather: Any) -> np.ndarray[Any, Any] | None:
    """Target of a reshape to what a gather with a table of indices gives; ``None`` for other gathers."""
    _, indices, axis = (port.get_node() for port in gather.input_values())
    table, dims = indices.get_output_partial_shape(0), list(gather.get_output_partial_shape(0))
    if axis.get_type_name() != "Constant" or gather.get_attributes()["batch_dims"] or len(table) < 2:
        return None
    place = int(axis.data) % (len(dims) - len(table) + 1)
    shape = [0] * place + [dim.get_length() if dim.is_static else -1 for dim in dims[place:]]
    return np.array(shape, np.int64) if shape.count(-1) <= 1 else None


def _replace(port: Any, readers: Iterable[Any], other: Any) -> None:
    """Lets readers of a value read what takes its place and its names."""
    names = port.get_names()
    port.set_names(set())
    other.set_names(names)
    for reader in readers:
        reader.replace_source_output(other)
