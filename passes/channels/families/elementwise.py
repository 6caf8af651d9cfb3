"""Operators that work element by element but are not tagged as pointwise by PyTorch."""

from __future__ import annotations

import torch
from fxcompress.passes.channels.layout import Dim, Layout, broadcast, position
from fxcompress.passes.channels.rules import Call, normalized_dim, pointwise, replaced, rule

aten = torch.ops.aten

rule(
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten._to_copy.default,
    aten.dropout.default,
    aten.alpha_dropout.default,
    aten.feature_dropout.default,
    aten.feature_alpha_dropout.default,
    aten.detach.default,
    aten.contiguous.default,
    aten.hardswish.default,
    aten.log_sigmoid.default,
    aten.masked_fill.Tensor,
    aten.fill.Scalar,
    aten.fill.Tensor,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.empty_like.default,
    aten.full_like.default,
    aten.rand_like.default,
    aten.randn_like.default,
    aten.bernoulli.p,
    aten.bernoulli.default,
    aten.type_as.default,
    aten.__and__.Tensor,
    aten.__or__.Tensor,
    aten.__xor__.Tensor,
    aten.logical_and.default,
    aten.logical_or.default,
    aten.floor_divide.default,
    aten.where.Scalar,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
)(pointwise)


@rule(aten.prelu.default)
def prelu(call: Call) -> Layout:
    """Slope c belongs to channel c, dim 1; a single slope to all."""
    x, slope = call.layout("self"), call.layout("weight")
    if len(slope) == 1 and slope[0]:
        call.join(x[1], slope[0])
    return x


@rule(aten.glu.default)
def glu(call: Call) -> Layout:
    """The first half of a dim is gated by the second."""
    x = call.layout("self")
    dim = normalized_dim(call["dim"], len(x))
    half = call.shape[dim]
    first, second = halves(call, x, dim, half)
    call.join(first, second)
    return replaced(x, {dim: first})


def halves(call: Call, x: Layout, dim: int, half: int) -> tuple[Dim, Dim]:
    """Both halves of a dim."""
    return call.algebra.taken(x[dim], slice(0, half)), call.algebra.taken(x[dim], slice(half, None))


@rule(aten.broadcast_tensors.default)
def broadcast_tensors(call: Call) -> list[Layout]:
    """Operands broadcast against each other."""
    layout = broadcast(call.algebra, call.tensors("tensors"))
    return [layout for _ in call.shapes]


@rule(aten.diff.default)
def diff(call: Call) -> Layout:
    """Neighbours along a dim matter, so it stays."""
    x = call.layout("self")
    dim = normalized_dim(call["dim"], len(x))
    call.keep(x[dim])
    return replaced(x, {dim: position(call.shape[dim])})


@rule(aten.cumsum.default, aten.cumprod.default, aten.logcumsumexp.default)
def cumulative(call: Call) -> Layout:
    """Each element depends on those before it, so the dim stays."""
    x = call.layout("self")
    call.keep(x[normalized_dim(call["dim"], len(x))])
    return x
