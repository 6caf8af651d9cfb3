"""Weights with a scale for each block of inputs in ONNX: DequantizeLinear with a block size, 4-bit integers packed."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from fxcompress.engines.integers import is_call

_BLOCKED = "dequantize_per_channel_group"
BLOCKS_OPSET = 21
"""The first that has blocks, and 4-bit integers."""

_INT4 = (-8, 7)


def block_translations(exported: ExportedProgram) -> dict[Any, Any]:
    """Translations for ``torch.onnx.export`` of a graph that has weights in blocks; none for others."""
    if not any(is_call(node, _BLOCKED) for node in exported.graph.nodes):
        return {}
    from onnxscript import opset21

    def dequantize(
        integers: Any,
        scales: Any,
        zero_points: Any,
        low: int,
        high: int,
        dtype: int,
        group_size: int,
        output_dtype: int,
    ) -> Any:
        return opset21.DequantizeLinear(integers, scales, axis=1, block_size=group_size)

    operator = torch.ops.quantized_decomposed.dequantize_per_channel_group.default
    return {operator: dequantize}


def block_sizes(module: fx.GraphModule) -> set[int]:
    """The sizes of the blocks that weights of a quantized model have scales for."""
    return {int(node.args[6]) for node in module.graph.nodes if is_call(node, _BLOCKED)}


def pack_blocks(model: Any) -> None:
    """Packs integers of blocks that fit into 4 bits, and stores weights the way round in which they are read.

    Engines have kernels for a matrix product with a weight in blocks, if no transposition stands between.
    """
    from onnx import numpy_helper

    graph = model.graph
    held = {tensor.name: tensor for tensor in graph.initializer}
    for node in [node for node in graph.node if _block_size(node)]:
        readers = [reader for reader in graph.node if node.output[0] in reader.input]
        turned = len(readers) == 1 and readers[0].op_type == "Transpose"
        integers, scales = (numpy_helper.to_array(held[name]) for name in node.input[:2])
        if turned:
            integers, scales = integers.T.copy(), scales.T.copy()
            next(attribute for attribute in node.attribute if attribute.name == "axis").i = 0
            node.output[0] = readers[0].output[0]
            graph.node.remove(readers[0])
        for index, array in enumerate((integers, scales)):
            name = f"{node.output[0]}_{node.input[index]}"
            graph.initializer.append(_tensor(name, array))
            node.input[index] = name
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in read]:
        graph.initializer.remove(tensor)


def _block_size(node: Any) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == "block_size"), 0)


def _tensor(name: str, array: Any) -> Any:
    from onnx import TensorProto, helper, numpy_helper

    if array.dtype.kind != "i" or array.min() < _INT4[0] or array.max() > _INT4[1]:
        return numpy_helper.from_array(array, name)
    nibbles = array.astype("uint8").flatten() & 15
    low, high = nibbles[::2], nibbles[1::2]
    packed = low.copy()
    packed[: len(high)] |= high << 4
    return helper.make_tensor(name, TensorProto.INT4, array.shape, packed.tobytes(), raw=True)
