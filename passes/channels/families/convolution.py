"""Convolutions: output filters against input channels, within groups."""

from __future__ import annotations

from typing import Any

import torch
from fxcompress.passes.channels.layout import Dim, Layout, dim_size, position
from fxcompress.passes.channels.rules import Call, replaced, rule

aten = torch.ops.aten


def _result(call: Call, x: Layout, channels: Dim, spatial: int) -> Layout:
    """The result has its channels, and places where the operand has places; a kernel of size 1 leaves those alone."""
    first = len(x) - spatial
    sizes = [dim_size(dim) for dim in x[first:]]
    mixed = [first + i for i in range(spatial) if sizes[i] != call.shape[first + i] or not _is_pointwise(call, i)]
    call.keep(*(x[index] for index in mixed))
    return replaced(x, {first - 1: channels, **{index: position(call.shape[index]) for index in mixed}})


def _is_pointwise(call: Call, index: int) -> bool:
    """Whether each place of a spatial dim is computed from that place alone."""
    kernel, stride, padding = call.layout("weight")[2 + index], _along(call["stride"], index), call["padding"]
    return not kernel and bool(stride == 1) and _along(padding, index) in (0, "same", "valid")


def _along(value: Any, index: int) -> Any:
    """An option for one spatial dim, where all may share one value."""
    if not isinstance(value, (list, tuple)):
        return value
    return value[index] if len(value) > 1 else value[0]


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
    _filtered(call, x[len(x) - spatial - 1], weight)
    return _result(call, x, weight[0], spatial)


@rule("torchvision::deform_conv2d")
def deformable(call: Call) -> Layout:
    """A convolution that looks where data says: channels are (offset groups, channels), offsets say where for each."""
    x, weight, offset, mask = (call.layout(name) for name in ("input", "weight", "offset", "mask"))
    call.keep(*x[2:], *offset[1:], *mask[1:])
    for other in (offset, mask):
        call.join(x[0], other[0])
    of_offset, _ = call.algebra.split(x[1], call["offset_groups"])
    call.keep(of_offset)
    _filtered(call, x[1], weight)
    return (x[0], weight[0], *(position(size) for size in call.shape[2:]))


def _filtered(call: Call, channels: Dim, weight: Layout) -> None:
    """Joins channels, filters and biases, within groups; a filter's taps stay."""
    call.keep(*weight[2:])
    groups = call.size(call["groups"])
    if groups == 1:
        call.join(channels, weight[1])
    else:
        of_input, inside = call.algebra.split(channels, groups)
        of_output, _ = call.algebra.split(weight[0], groups)
        call.join(of_input, of_output)
        if not isinstance(call["groups"], int):  # a kernel for each sample: as many groups as there are
            call.keep(of_input)
        call.join(inside, weight[1])
    if call.given("bias"):
        call.join(weight[0], call.layout("bias")[0])


@rule(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
def transposed(call: Call) -> Layout:
    """Weight ``(inputs, outputs / groups, *kernel)``."""
    x, weight = call.layout("input"), call.layout("weight")
    spatial = len(weight) - 2
    call.keep(*weight[2:])
    groups, channels = call.size(call["groups"]), x[len(x) - spatial - 1]
    call.join(channels, weight[0])
    outputs = weight[1]
    if groups > 1:
        of_input, _ = call.algebra.split(weight[0], groups)
        if not isinstance(call["groups"], int):
            call.keep(of_input)
        outputs = (*of_input, *weight[1])
    if call.given("bias"):
        call.join(outputs, call.layout("bias")[0])
    return _result(call, x, outputs, spatial)
