"""Faults of OpenVINO's CPU kernels (seen in 2026.4) that a file can be written around."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

_LAYERS = frozenset({"Convolution", "GroupConvolution", "MatMul"})
_PASSING = frozenset({"Pad", "Reshape", "Transpose", "Squeeze", "Unsqueeze"})
_EXTREMES = frozenset({"ReduceMax", "ReduceMin"})
_SCALING = frozenset({"Multiply", "Divide"})

_NEXT_TO_NOTHING = 1e-30
"""Less than the last bit of what it is added to; a bias of 0 would be dropped."""


def write_around_faults(model: Any) -> None:
    """Changes a model with quantizers so that the faults do not show; one without is left as it is."""
    if any(node.get_type_name() == "FakeQuantize" for node in model.get_ops()):
        _give_biases(model)
        _pad_before_pools(model)
        _keep_extremes_apart(model)


def _give_biases(model: Any) -> None:
    """Gives a bias to layers whose result several read, or a gather reads.

    Where such a layer computes in integers and has none, the factor that makes real numbers of its sums is moved
    behind a reader that lets it pass (a quantizer, a maximum), and stays before it as well: what that gives is 0, or
    next to it. Behind a gather with a table of indices it is moved as if that added no dims, and fits no longer. A
    layer with real weights is left alone: with a bias, some get a slower kernel.
    """
    import openvino
    from openvino import opset13 as ops

    for node in model.get_ops():
        port = node.output(0) if node.get_type_name() in _LAYERS else None
        if port is None or any(map(_is_real_constant, node.input_values())):
            continue
        if port.get_element_type() == openvino.Type.f32 and _is_misread(port):
            readers = port.get_target_inputs()
            bias = np.full([1] * len(port.get_partial_shape()), _NEXT_TO_NOTHING, np.float32)
            _replace(port, readers, ops.add(port, ops.constant(bias)).output(0))


def _pad_before_pools(model: Any) -> None:
    """Pads what an average over windows reads, where the padding counts, by an operator of its own.

    Where integers have a zero point, such a pool pads with the integer 0 instead. A pad with real zeros would be made
    one with the pool again.
    """
    from openvino import opset13 as ops

    for node in model.get_ops():
        pool = node.get_attributes() if node.get_type_name() == "AvgPool" else {}
        pads = [pool.get(side, []) for side in ("pads_begin", "pads_end")]
        if not any(map(any, pads)) or pool["exclude-pad"] or pool["rounding_type"] != "floor":
            continue
        begin, end = (ops.constant(np.array([0, 0, *side], np.int64)) for side in pads)
        padded = ops.pad(node.input_value(0), begin, end, "constant", ops.constant(np.float32(_NEXT_TO_NOTHING)))
        none = [0] * len(pads[0])
        alone = ops.avg_pool(padded, pool["strides"], none, none, pool["kernel"], exclude_pad=True)
        port = node.output(0)
        _replace(port, port.get_target_inputs(), alone.output(0))


def _keep_extremes_apart(model: Any) -> None:
    """Has the maximum or minimum over dims read twice, so that it is not made one with a quantizer behind it.

    What is left of all values but the last would be kept in the quantizer's integers before they are scaled.
    """
    from openvino import opset13 as ops

    for node in model.get_ops():
        port = node.output(0) if node.get_type_name() in _EXTREMES else None
        if port is not None and port.get_element_type().is_real():
            readers = port.get_target_inputs()
            _replace(port, readers, ops.maximum(port, port).output(0))


def _replace(port: Any, readers: Iterable[Any], by: Any) -> None:
    """Lets readers of a value read what takes its place and its names."""
    names = port.get_names()
    port.set_names(set())
    by.set_names(names)
    for reader in readers:
        reader.replace_source_output(by)


def _is_real_constant(port: Any) -> bool:
    """Whether a value is a constant that no quantizer has made, in whatever shape."""
    import openvino

    node = port.get_node()
    if node.get_type_name() in _PASSING:
        return _is_real_constant(node.input_value(0))
    return bool(node.get_type_name() == "Constant" and port.get_element_type() == openvino.Type.f32)


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
