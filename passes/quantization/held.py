"""What a quantized layer holds, for the cost of a model: integers in place of its weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from fxcompress.passes.quantization.nodes import is_quantization, quantized
from fxcompress.passes.quantization.targets import PADS, VIEWS
from torch import fx

from fxcompress.ir.ops import argument_names, get_state, overload_of

_THROUGH = VIEWS | PADS | {torch.ops.aten.cat.default}
_PACKED = 4
"""Bits of integers in groups that two share a byte."""


@dataclass(frozen=True)
class IntegerWeight:
    """A weight that goes through a pair of Q/DQ nodes.

    Attributes:
        name: Its qualified name.
        bits: Bits of its integers.
        tensors: The weight and what its grid is made of, each with the bytes that it takes in a file.
    """

    name: str
    bits: int
    tensors: tuple[tuple[torch.Tensor, int], ...]


def integer_weight(root: fx.GraphModule, node: fx.Node) -> IntegerWeight | None:
    """The quantized weight that a node reads, if it reads one."""
    return next((found for operand in node.all_input_nodes for found in _behind(root, operand)), None)


def reads_integers(root: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a layer reads a value that was made of integers, maybe through views of it."""
    return any(_made_of_integers(root, operand) for operand in node.all_input_nodes)


def _made_of_integers(root: fx.GraphModule, node: fx.Node) -> bool:
    while overload_of(root, node) in _THROUGH:
        node = node.all_input_nodes[0]
    return is_quantization(node) and not any(_behind(root, node))


def _behind(root: fx.GraphModule, dequantize: fx.Node) -> Iterator[IntegerWeight]:
    """The weight whose integers a node makes real again, if it does so."""
    quantize = dequantize.args[0] if is_quantization(dequantize) else None
    if not isinstance(quantize, fx.Node) or not is_quantization(quantize):
        return
    operator: Any = quantize.target
    given: dict[str, Any] = dict(zip(argument_names(operator), quantize.args, strict=False))
    source = given["input"]
    if not isinstance(source, fx.Node) or source.op != "get_attr":
        return
    bits = (given["quant_max"] - given["quant_min"]).bit_length()
    packed = bits <= _PACKED and quantize.target is quantized.quantize_per_channel_group.default
    weight = get_state(root, str(source.target))
    others = [
        get_state(root, str(x.target)) for x in quantize.all_input_nodes if x.op == "get_attr" and x is not source
    ]
    sizes = [(other, other.numel() * (4 if other.is_floating_point() else 1)) for other in others]
    yield IntegerWeight(str(source.target), bits, ((weight, weight.numel() // (2 if packed else 1)), *sizes))
