"""Grids that are found at run time, in ONNX: DynamicQuantizeLinear, and products of integers behind it.

onnxruntime looks for Q/DQ nodes around its integer kernels only where scales are constants. Where they are not, it has
kernels for products that are written with integers: MatMulInteger, multiplied by both scales.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram

from fxcompress.engines.integers import is_call
from fxcompress.engines.onnx_reading import replace_nodes

_PRODUCTS = ("MatMul", "Gemm")


def grid_translations(exported: ExportedProgram) -> dict[Any, Any]:
    """Translations for ``torch.onnx.export`` of a graph whose grids are found at run time; none for others."""
    if not any(is_call(node, "choose_qparams") for node in exported.graph.nodes):
        return {}
    from onnxscript import opset18

    def choose(x: Any, low: int, high: int, least: float, dtype: int) -> Any:
        _, scale, zero_point = opset18.DynamicQuantizeLinear(x)
        return scale, zero_point

    def quantize(x: Any, scale: Any, zero_point: Any, low: int, high: int, dtype: int) -> Any:
        return opset18.QuantizeLinear(x, scale, zero_point)

    def dequantize(
        x: Any, scale: Any, zero_point: Any, low: int, high: int, dtype: int, output_dtype: int | None = None
    ) -> Any:
        return opset18.DequantizeLinear(x, scale, zero_point)

    operators = torch.ops.quantized_decomposed
    return {
        operators.choose_qparams.tensor: choose,
        operators.quantize_per_tensor.tensor: quantize,
        operators.dequantize_per_tensor.tensor: dequantize,
    }


def forget_types(model: Any) -> None:
    """Takes away what the file says of grids: PyTorch has other dtypes for them."""
    grids = {name for node in model.graph.node if node.op_type == "DynamicQuantizeLinear" for name in node.output}
    kept = [value for value in model.graph.value_info if value.name not in grids]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)


def multiply_integers(file: Path) -> None:
    """Writes products of what is quantized at run time and of quantized weights as products of integers."""
    import onnx

    model = onnx.load(file)
    if not any(node.op_type == "DynamicQuantizeLinear" for node in model.graph.node):
        return
    made = {name: node for node in model.graph.node for name in node.output}
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes: list[Any] = []
    for node in model.graph.node:
        grid = _grid(node, made) if node.op_type in _PRODUCTS else None
        weight = None if grid is None else _weight(node, made, held)
        if weight is None:
            nodes.append(node)
            continue
        names = [f"{node.output[0]}_{part}" for part in ("integers", "scales")]
        model.graph.initializer.extend(map(onnx.numpy_helper.from_array, weight, names))
        nodes += _product(node, grid, *names)
    replace_nodes(model, nodes)
    onnx.save(model, file)


def _grid(node: Any, made: dict[str, Any]) -> Any:
    """The DynamicQuantizeLinear node that the first operand's integers are of, if there is one."""
    dequantize = made.get(node.input[0])
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return None
    found = made.get(dequantize.input[1])
    return found if found is not None and found.op_type == "DynamicQuantizeLinear" else None


def _weight(node: Any, made: dict[str, Any], held: dict[str, Any]) -> tuple[np.ndarray[Any, Any], ...] | None:
    """The integers ``(inputs, outputs)`` of the second operand and the scale of each output, if they are constants."""
    from onnx import numpy_helper

    turned = _attribute(node, "transB", 0) == 1
    source = made.get(node.input[1])
    if source is not None and source.op_type == "Transpose":
        turned, source = not turned, made.get(source.input[0])
    if source is None or source.op_type != "DequantizeLinear" or not {*source.input[:2]} <= held.keys():
        return None
    integers, scales = (numpy_helper.to_array(held[name]) for name in source.input[:2])
    outputs = 0 if turned else 1
    if integers.ndim != 2 or scales.ndim != 1 or _attribute(source, "axis", 1) != outputs:
        return None
    return np.ascontiguousarray(integers.T if turned else integers), scales


def _attribute(node: Any, name: str, default: int) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == name), default)


def _product(node: Any, grid: Any, integers: str, scales: str) -> Iterator[Any]:
    from onnx import TensorProto, helper

    result = node.output[0]
    bias = node.input[2] if len(node.input) > 2 else None
    sums, real, both = (f"{result}_{part}" for part in ("sums", "real", "both_scales"))
    product = result if bias is None else f"{result}_product"
    yield helper.make_node("MatMulInteger", [grid.output[0], integers, grid.output[2]], [sums], sums)
    yield helper.make_node("Cast", [sums], [real], real, to=TensorProto.FLOAT)
    yield helper.make_node("Mul", [grid.output[1], scales], [both], both)
    yield helper.make_node("Mul", [real, both], [product], product)
    if bias is not None:
        yield helper.make_node("Add", [product, bias], [result], result)
