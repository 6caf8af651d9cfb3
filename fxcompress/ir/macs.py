"""Multiply-accumulates of an operation, by exact overload.

What counts is what ``torch.utils.flop_counter`` counts, halved: convolutions, matrix products and attention. Biases,
normalization, activations and other element-wise work are left out, as in the literature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ShapedCall:
    """A call with every tensor replaced by its shape.

    Attributes:
        arguments: Arguments by the schema's name; a list of tensors is a list of shapes.
        output: Shape of the (first) output.
    """

    arguments: Mapping[str, Any]
    output: Shape

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]


Rule = Callable[[ShapedCall], int]

RULES: dict[OpOverload, Rule] = {}
"""Overload -> rule; an overload without one multiplies nothing."""


def counts(*overloads: OpOverload) -> Callable[[Rule], Rule]:
    """Registers how the MACs of these overloads are counted; an overload has one rule."""

    def register(rule: Rule) -> Rule:
        for overload in overloads:
            if overload in RULES:
                raise ValueError(f"MACs of {overload} are already counted by {RULES[overload].__name__}")
            RULES[overload] = rule
        return rule

    return register


def _product(shape: Sequence[int]) -> int:
    return math.prod(shape)


@counts(
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
)
def _conv(call: ShapedCall) -> int:
    return _positions(call.output, call["weight"]) * _product(call["weight"])


@counts(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
def _conv_transpose(call: ShapedCall) -> int:
    return _positions(call["input"], call["weight"]) * _product(call["weight"])


@counts(aten.convolution.default)
def _convolution(call: ShapedCall) -> int:
    return _conv_transpose(call) if call["transposed"] else _conv(call)


def _positions(shape: Shape, weight: Shape) -> int:
    """Places a filter is applied at: batch x spatial dims; the channel dim is left out."""
    spatial = len(weight) - 2
    batch = _product(shape[: -spatial - 1])
    return batch * _product(shape[-spatial:])


@counts(aten.linear.default)
def _linear(call: ShapedCall) -> int:
    return _product(call.output) * int(call["input"][-1])


@counts(aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default)
def _matmul(call: ShapedCall) -> int:
    return _product(call.output) * int(call["self"][-1])


@counts(aten.addmm.default)
def _addmm(call: ShapedCall) -> int:
    return _product(call.output) * int(call["mat1"][-1])


@counts(aten.baddbmm.default)
def _baddbmm(call: ShapedCall) -> int:
    return _product(call.output) * int(call["batch1"][-1])


@counts(aten.inner.default)
def _inner(call: ShapedCall) -> int:
    """A number times a tensor is element-wise work."""
    return _matmul(call) if call["self"] and call["other"] else 0


@counts(aten.tensordot.default)
def _tensordot(call: ShapedCall) -> int:
    return _product(call.output) * _product([call["self"][dim] for dim in call["dims_self"]])


@counts(aten.einsum.default)
def _einsum(call: ShapedCall) -> int:
    """Counted on the meta device: the order of contraction is torch's own choice."""
    operands = [torch.empty(shape, device="meta") for shape in call["tensors"]]
    with FlopCounterMode(display=False) as counter:
        aten.einsum.default(call["equation"], operands, path=call["path"])
    return int(counter.get_total_flops()) // 2


@counts(aten.scaled_dot_product_attention.default)
def _attention(call: ShapedCall) -> int:
    """Both products, masked or not; grouped queries share keys, which saves no products."""
    *batch, queries, head_dim = call["query"]
    keys, value_dim = call["value"][-2:]
    return _product([*batch, queries, keys, head_dim + value_dim])


@counts(aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)
def _recurrent(call: ShapedCall) -> int:
    """Every weight matrix, of each layer and direction, is applied once a step."""
    steps = _product(call["input"][:-1])
    return steps * _matrices(call["params"])


@counts(aten.lstm.data, aten.gru.data, aten.rnn_tanh.data, aten.rnn_relu.data)
def _recurrent_packed(call: ShapedCall) -> int:
    rows: int = call["data"][0]
    return rows * _matrices(call["params"])


@counts(aten.lstm_cell.default, aten.gru_cell.default, aten.rnn_tanh_cell.default, aten.rnn_relu_cell.default)
def _recurrent_cell(call: ShapedCall) -> int:
    """Both weight matrices are applied once a row."""
    return _product(call["input"][:-1]) * _matrices([call["w_ih"], call["w_hh"]])


def _matrices(shapes: Sequence[Shape]) -> int:
    return sum(_product(shape) for shape in shapes if len(shape) == 2)
