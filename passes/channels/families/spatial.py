"""Pooling, resampling and padding: channels pass, places are counted anew."""

from __future__ import annotations

import torch
from fxcompress.passes.channels.layout import Layout, broadcast, position
from fxcompress.passes.channels.rules import Call, Result, Rule, replaced, rule

aten = torch.ops.aten

_RANKS = {
    1: "avg_pool1d.default max_pool1d.default adaptive_avg_pool1d.default upsample_nearest1d.vec "
    "upsample_linear1d.vec upsample_nearest1d.default upsample_linear1d.default reflection_pad1d.default "
    "replication_pad1d.default _upsample_nearest_exact1d.vec lp_pool1d.default",
    2: "avg_pool2d.default max_pool2d.default adaptive_avg_pool2d.default _adaptive_avg_pool2d.default "
    "upsample_nearest2d.vec upsample_bilinear2d.vec upsample_bicubic2d.vec upsample_nearest2d.default "
    "upsample_bilinear2d.default upsample_bicubic2d.default _upsample_bicubic2d_aa.vec _upsample_bilinear2d_aa.vec "
    "_upsample_nearest_exact2d.vec reflection_pad2d.default replication_pad2d.default "
    "_upsample_bilinear2d_aa.default _upsample_bicubic2d_aa.default",
    3: "avg_pool3d.default max_pool3d.default adaptive_avg_pool3d.default upsample_nearest3d.vec "
    "upsample_trilinear3d.vec replication_pad3d.default reflection_pad3d.default upsample_nearest3d.default "
    "upsample_trilinear3d.default",
}
_WITH_INDICES = {
    1: "max_pool1d_with_indices.default adaptive_max_pool1d.default",
    2: "max_pool2d_with_indices.default adaptive_max_pool2d.default",
    3: "max_pool3d_with_indices.default adaptive_max_pool3d.default",
}
_UNPOOLED = {2: "max_unpool2d.default", 3: "max_unpool3d.default"}


def _resampled(call: Call, spatial: int) -> Layout:
    """Values, and what says where each of them goes, are of the same channels."""
    operands = call.operands()
    for operand in operands:
        call.keep(*operand[len(operand) - spatial :])
    x = broadcast(call.algebra, operands)
    return replaced(x, {d: position(call.shapes[0][d]) for d in range(len(x) - spatial, len(x))})


def _register(names: dict[int, str], results: int) -> None:
    for spatial, text in names.items():
        for name in text.split():
            packet, _, overload = name.partition(".")
            found = getattr(getattr(aten, packet, None), overload, None)
            if found is not None:
                rule(found)(_rule(spatial, results))


def _rule(spatial: int, results: int) -> Rule:
    def resample(call: Call) -> Result:
        layout = _resampled(call, spatial)
        return layout if results == 1 else [layout] * results

    return resample


_register(_RANKS, 1)
_register(_UNPOOLED, 1)
_register(_WITH_INDICES, 2)


@rule(aten.grid_sampler.default, aten.grid_sampler_2d.default)
def grid_sampler(call: Call) -> Layout:
    """Channels are sampled at given places."""
    x, grid = call.layout("input"), call.layout("grid")
    call.keep(*x[2:], *grid[1:])
    call.join(x[0], grid[0])
    return (*x[:2], *(position(size) for size in call.shape[2:]))
