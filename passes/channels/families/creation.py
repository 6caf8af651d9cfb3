"""Operators that make tensors from sizes alone."""

from __future__ import annotations

import torch
from fxcompress.passes.channels.layout import Layout, factor_of, position
from fxcompress.passes.channels.rules import Call, rule

aten = torch.ops.aten


@rule(aten.full.default, aten.zeros.default, aten.ones.default, aten.new_zeros.default, aten.new_full.default,
      aten.new_ones.default)  # fmt: skip
def filled(call: Call) -> Layout:
    """One value everywhere: any number of elements will do, along the part of each dim that is of known size."""
    dims = []
    for size, known in zip(call.shape, call.operation.node.meta["val"].shape, strict=True):
        part = factor_of(known)
        dims.append((*position(size // part), *call.fresh(part)) if part < 1 << 20 else position(size))
    return tuple(dims)


@rule(aten.arange.default, aten.arange.start, aten.arange.start_step, aten.linspace.default, aten.eye.default,
      aten.eye.m, aten.scalar_tensor.default, aten.tril_indices.default, aten.rand.default,
      aten.randn.default)  # fmt: skip
def numbered(call: Call) -> Layout:
    """Values depend on the place, or are drawn one after the other, so all stay."""
    return call.positions()


@rule(aten.affine_grid_generator.default)
def affine_grid(call: Call) -> Layout:
    """Coordinates of places, from matrices that are needed whole."""
    return call.barrier()  # type: ignore[return-value]


@rule(aten.tril.default, aten.triu.default)
def triangle(call: Call) -> Layout:
    """What is kept depends on the place in the last two dims, so they stay."""
    x = call.layout("self")
    call.keep(*x[-2:])
    return x
