"""Quantized ONNX files, written so that each engine finds its integer kernels in them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fxcompress.engines.onnx_reading import read_by, replace_nodes


def drop_zero_points(file: Path) -> None:
    """Takes zero points that are all 0 away from the DequantizeLinear nodes of a file's signed integers, for OpenVINO.

    They are the default. Weights of one size share them as one constant, and OpenVINO folds no constant that several
    nodes read: it would find weights of any zero point, and compute those layers in floating point.
    """
    import onnx

    model = onnx.load(file)
    held = _initializers(model)
    signed = (onnx.TensorProto.INT8, onnx.TensorProto.INT4)
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or len(node.input) < 3:
            continue
        integers, zero_point = held.get(node.input[0]), held.get(node.input[2])
        if integers is None or zero_point is None or integers.data_type not in signed:
            continue
        if not onnx.numpy_helper.to_array(zero_point).any():
            del node.input[2]
    onnx.save(model, file)


def round_biases(file: Path) -> None:
    """Makes integers of the biases of a file's quantized linear layers, for onnxruntime.

    They are rounded to steps of input scale times weight scale, which is what an accumulator counts in. onnxruntime
    does so by itself only where the result is quantized too, and has an integer kernel only for what is rounded.
    """
    import onnx

    model = onnx.load(file)
    held, made = _initializers(model), {node.output[0]: node for node in model.graph.node}
    nodes = []
    for node in model.graph.node:
        bias = held.get(node.input[2]) if node.op_type == "Gemm" and len(node.input) > 2 else None
        scales = [found for name in node.input[:2] if (found := _scale(made.get(name), held)) is not None]
        if bias is not None and len(scales) == 2:
            value, scale = onnx.numpy_helper.to_array(bias), np.float32(scales[0] * scales[1])
            steps = np.rint(np.float64(value) / scale).clip(-(2**31), 2**31 - 1).astype(np.int32)
            names = [f"{node.input[2]}_{node.output[0]}_{part}" for part in ("integers", "scale", "dequantized")]
            model.graph.initializer.append(onnx.numpy_helper.from_array(steps, names[0]))
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.broadcast_to(scale, steps.shape), names[1]))
            nodes.append(onnx.helper.make_node("DequantizeLinear", names[:2], names[2:], names[2], axis=0))
            node.input[2] = names[2]
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, file)


def add_hard_sigmoids(file: Path) -> None:
    """Writes hard sigmoids between integers as sums, for which onnxruntime has an integer kernel.

    ``alpha * x + beta`` is the same integers with a step of ``alpha`` times as much, and a constant; the quantizer
    behind saturates at 0, and at 1 or before.
    """
    import onnx

    model = onnx.load(file)
    if not any(node.op_type == "HardSigmoid" for node in model.graph.node):
        return
    held, made = _initializers(model), {name: node for node in model.graph.node for name in node.output}
    beyond = {name for node in model.graph.node if not _saturates(node, held) for name in read_by(node)}
    beyond |= {value.name for value in model.graph.output}
    nodes = []
    for node in model.graph.node:
        source = made.get(node.input[0]) if node.op_type == "HardSigmoid" else None
        scale = _scale(source, held)
        if source is None or scale is None or scale.size != 1 or node.output[0] in beyond:
            nodes.append(node)
        else:
            given = {attribute.name: attribute.f for attribute in node.attribute}
            nodes += _sum_of(source, scale * given.get("alpha", 0.2), given.get("beta", 0.5), node.output[0], model)
    replace_nodes(model, nodes)
    onnx.save(model, file)


def _saturates(node: Any, held: Mapping[str, Any]) -> bool:
    """Whether a node makes integers of what is from 0 to 1, and of nothing beyond."""
    import onnx

    if node.op_type != "QuantizeLinear" or len(node.input) < 3 or not held.keys() >= set(node.input[1:]):
        return False
    scale, zero_point = (onnx.numpy_helper.to_array(held[name]) for name in node.input[1:])
    from_0 = zero_point.dtype == np.uint8 and not zero_point.any()
    return bool(from_0 and scale.size == 1 and scale * 255 <= 1 + 1e-6)


def _sum_of(source: Any, scale: np.ndarray[Any, Any], addend: float, name: str, model: Any) -> list[Any]:
    """The sum of integers of a new scale and a number."""
    import onnx

    made = {"scale": np.float32(scale), "one": np.uint8(1), "addend": np.float32(addend), "zero": np.uint8(0)}
    for part, value in made.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), f"{name}_{part}"))
    terms = [f"{name}_scaled", f"{name}_constant"]
    return [
        onnx.helper.make_node("DequantizeLinear", [source.input[0], f"{name}_scale", *source.input[2:]], terms[:1]),
        onnx.helper.make_node(
            "DequantizeLinear", [f"{name}_one", f"{name}_addend", f"{name}_zero"], terms[1:], terms[1]
        ),
        onnx.helper.make_node("Add", terms, [name], name),
    ]


def _initializers(model: Any) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in model.graph.initializer}


def _scale(node: Any, held: Mapping[str, Any]) -> np.ndarray[Any, Any] | None:
    """What an operand's integers are multiplied by, if it is made of integers by constants."""
    import onnx

    if node is None or node.op_type != "DequantizeLinear" or node.input[1] not in held:
        return None
    scale: np.ndarray[Any, Any] = onnx.numpy_helper.to_array(held[node.input[1]])
    return scale
