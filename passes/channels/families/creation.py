"""Operators that make tensors from sizes alone."""

from __future__ import annotations

import torch
from fxcompress.passes.channels.layout import Layout, position
from fxcompress.passes.channels.rules import Call, rule

aten = torch.ops.aten


@rule(aten.full.default, aten.zeros.default, aten.ones.default, aten.new_zeros.default, aten.new_full.default,
      aten.new_ones.default, aten.rand.default, aten.randn.default)  # fmt: skip
def filled(call: Call) -> Layout:
    """One value everywhere: any number of elements will do, along dims of known size."""
    value = call.operation.node.meta["val"]
    return tuple(
        call.fresh(size) if isinstance(known, int) and size < 1 << 20 else position(size)
        for size, known in zip(call.shape, value.shape, strict=True)
    )


@rule(aten.arange.default, aten.arange.start, aten.arange.start_step, aten.linspace.default, aten.eye.default,
      aten.eye.m, aten.scalar_tensor.default, aten.tril_indices.default)  # fmt: skip
def numbered(call: Call) -> Layout:
    """Values depend on the place, so all stay."""
    return call.positions()


@rule(aten.tril.default, aten.triu.default)
def triangle(call: Call) -> Layout:
    """What is kept depends on the place in the last two dims, so they stay."""
    x = call.layout("self")
    call.keep(*x[-2:])
    return x
