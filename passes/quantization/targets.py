"""Targets: what each engine computes in integers, as data.

An engine has an integer kernel for an operator only in a certain surrounding, and only what is written the way it looks
for is found. A profile says which operands an operator may read as integers, what passes integers through as they are,
and what must agree; :mod:`fxcompress.passes.quantization.placement` does the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch._ops import OpOverload

from fxcompress.errors import InputError, did_you_mean

aten = torch.ops.aten

CONVOLUTIONS = (
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.conv3d.padding,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
)
LAYERS: Mapping[OpOverload, tuple[str, ...]] = {
    **dict.fromkeys(CONVOLUTIONS, ("input",)),
    aten.linear.default: ("input",),
}
"""Layers with a weight, which becomes integers too."""

ACTIVATIONS = frozenset({aten.relu.default, aten.hardtanh.default, aten.relu6.default, aten.clamp.default})
"""What every engine computes together with the layer before it."""

VIEWS = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.permute.default,
        aten.transpose.int,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unsqueeze.default,
        aten.expand.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.max_pool2d.default,
        aten.pixel_shuffle.default,
        aten.channel_shuffle.default,
    }
)
"""Each element of the result is one of the operand: integers go through with the same scale."""


@dataclass(frozen=True)
class Target:
    """What an engine computes in integers.

    Attributes:
        layers: Operator -> the operands that it always reads as integers.
        carriers: Operator -> the operands that it reads as integers where its result is read so as well.
        fused: Activations that are computed with the operator before them.
        views: Operators that pass integers through.
        joins: Operators that pass integers through if all operands have one scale and zero point.
        closed: Whether an integer kernel must also give integers, to all who read its result.
        symmetric: Whether 0 is the middle of signed activations.
    """

    layers: Mapping[OpOverload, tuple[str, ...]]
    carriers: Mapping[OpOverload, tuple[str, ...]]
    fused: frozenset[OpOverload]
    views: frozenset[OpOverload]
    joins: frozenset[OpOverload]
    closed: bool
    symmetric: bool


_ELEMENTWISE = {aten.add.Tensor: ("self", "other"), aten.mul.Tensor: ("self", "other")}

TARGETS: Mapping[str, Target] = {
    "openvino": Target(
        layers=LAYERS,
        carriers={**_ELEMENTWISE, aten.mean.dim: ("self",), aten.adaptive_avg_pool2d.default: ("self",),
                  aten.avg_pool2d.default: ("self",)},
        fused=ACTIVATIONS,
        views=VIEWS,
        joins=frozenset({aten.cat.default}),
        closed=False,
        symmetric=True,
    ),
    "onnxruntime": Target(
        layers=LAYERS,
        carriers={**_ELEMENTWISE, aten.mean.dim: ("self",), aten.adaptive_avg_pool2d.default: ("self",),
                  aten.avg_pool2d.default: ("self",)},
        fused=ACTIVATIONS,
        views=VIEWS,
        joins=frozenset({aten.cat.default}),
        closed=True,
        symmetric=False,
    ),
}  # fmt: skip
"""Name -> profile."""


def target_of(name: str) -> Target:
    """The profile of that name.

    Raises:
        InputError: There is none; near names are given.
    """
    if name not in TARGETS:
        near = did_you_mean(name, TARGETS) or f"; targets: {', '.join(sorted(TARGETS))}"
        raise InputError(f"there is no quantization target {name!r}{near}")
    return TARGETS[name]
