"""What lets a positive factor for each channel through, as data: ``f(s * x) = s * f(x)``."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch._ops import OpOverload

from fxcompress.ir.ops import Operation

aten = torch.ops.aten

SCALED: Mapping[OpOverload, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            aten.relu.default, aten.leaky_relu.default, aten.prelu.default, aten.neg.default, aten.dropout.default,
            aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default, aten.avg_pool1d.default,
            aten.avg_pool2d.default, aten.avg_pool3d.default, aten.adaptive_avg_pool1d.default,
            aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default, aten.mean.dim, aten.sum.dim_IntList,
            aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int,
            aten.permute.default, aten.transpose.int, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default,
            aten.expand.default, aten.slice.Tensor, aten.select.int, aten.split.Tensor,
            aten.split_with_sizes.default, aten.chunk.default, aten.contiguous.default, aten.clone.default,
            aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec, aten.pixel_shuffle.default,
            aten.channel_shuffle.default, aten.roll.default,
        ),
        ("self", "input"),
    ),
    aten.add.Tensor: ("self", "other"),
    aten.sub.Tensor: ("self", "other"),
    aten.cat.default: ("tensors",),
    aten.stack.default: ("tensors",),
    aten.scaled_dot_product_attention.default: ("value",),
}  # fmt: skip
"""Operator -> the operands that must all have the factors, for the result to have them."""

PRODUCTS: Mapping[OpOverload, tuple[str, ...]] = {
    aten.mul.Tensor: ("self", "other"),
    aten.div.Tensor: ("self",),
    aten.matmul.default: ("self", "other"),
    aten.bmm.default: ("self", "mat2"),
}
"""Operator -> the operands of which one must have the factors."""

CONTRACTIONS = frozenset(
    {
        aten.mean.dim, aten.sum.dim_IntList, aten.matmul.default, aten.bmm.default,
        aten.scaled_dot_product_attention.default,
    }
)  # fmt: skip
"""Operators that add elements up: none of those may differ in their factor."""

JOINTS = frozenset({aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor})
"""Operators that spread operands over the result: each must have the factor of the result's element."""

CLAMPS: Mapping[OpOverload, tuple[str, str]] = {
    aten.hardtanh.default: ("min_val", "max_val"),
    aten.clamp.default: ("min", "max"),
    aten.relu6.default: ("", ""),
}
"""Operator -> the names of its bounds; those of ReLU6 have none."""

NORMS: Mapping[OpOverload, int] = {
    aten.layer_norm.default: -1,
    aten.rms_norm.default: -1,
    aten.group_norm.default: 1,
    aten.batch_norm.default: 1,
}
"""Normalization -> the dim of its result that its weight and bias are for."""


def bounds(call: Operation) -> tuple[float, float] | None:
    """The bounds of a clamp."""
    if call.overload not in CLAMPS:
        return None
    if call.overload is aten.relu6.default:
        return 0.0, 6.0
    low, high = (call[name] for name in CLAMPS[call.overload])
    return -math.inf if low is None else float(low), math.inf if high is None else float(high)
