"""Convolutions: output filters against input channels, within groups."""

from __future__ import annotations

import torch
from fxcompress.passes.channels.layout import Dim, Layout
from fxcompress.passes.channels.rules import Call, rule

aten = torch.ops.aten


def _result(call: Call, x: Layout, channels: Dim, spatial: int) -> Layout:
    """The result has its channels, and places where the operand has places."""
    call.keep(*x[len(x) - spatial :])
    return (*x[: len(x) - spatial - 1], channels, *call.positions()[len(x) - spatial :])


@rule(
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
)
def convolution(call: Call) -> Layout:
    """Weight ``(outputs, inputs / groups, *kernel)``: outputs are (groups, filters), inputs (groups, channels)."""
    x, weight = call.layout("input"), call.layout("weight")
    spatial = len(weight) - 2
    call.keep(*weight[2:])
    groups, channels = call["groups"], x[len(x) - spatial - 1]
    if groups == 1:
        call.join(channels, weight[1])
    else:
        of_input, inside = call.algebra.split(channels, groups)
        of_output, _ = call.algebra.split(weight[0], groups)
        call.join(of_input, of_output)
        call.join(inside, weight[1])
    if call.given("bias"):
        call.join(weight[0], call.layout("bias")[0])
    return _result(call, x, weight[0], spatial)


@rule(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
def transposed(call: Call) -> Layout:
    """Weight ``(inputs, outputs / groups, *kernel)``."""
    x, weight = call.layout("input"), call.layout("weight")
    spatial = len(weight) - 2
    call.keep(*weight[2:])
    groups, channels = call["groups"], x[len(x) - spatial - 1]
    call.join(channels, weight[0])
    outputs = weight[1]
    if groups > 1:
        of_input, _ = call.algebra.split(weight[0], groups)
        outputs = (*of_input, *weight[1])
    if call.given("bias"):
        call.join(outputs, call.layout("bias")[0])
    return _result(call, x, outputs, spatial)
