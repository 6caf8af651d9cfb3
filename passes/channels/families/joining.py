"""Operators that put tensors together or take them apart: cat, stack, split, slice, select, pad, scatter."""

from __future__ import annotations

from typing import Any

import torch
from fxcompress.passes.channels.layout import Dim, Layout, dim_size, is_dynamic, is_position, position
from fxcompress.passes.channels.rules import Call, dropped, normalized_dim, replaced, rule

aten = torch.ops.aten


@rule(aten.cat.default)
def cat(call: Call) -> Layout:
    """Elements one after the other along a dim; the other dims are joined."""
    parts = [layout for layout in call.tensors("tensors") if not (len(layout) == 1 < len(call.shape))]
    dim = normalized_dim(call["dim"], len(call.shape))
    for other in parts[1:]:
        for index in range(len(call.shape)):
            if index != dim:
                call.join(parts[0][index], other[index])
    return replaced(parts[0], {dim: call.algebra.concatenated(part[dim] for part in parts)})


@rule(aten.stack.default)
def stack(call: Call) -> Layout:
    """A new dim, all of whose entries stay."""
    parts = call.tensors("tensors")
    for other in parts[1:]:
        for a, b in zip(parts[0], other, strict=True):
            call.join(a, b)
    dim = normalized_dim(call["dim"], len(parts[0]) + 1)
    return (*parts[0][:dim], position(len(parts)), *parts[0][dim:])


@rule(
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.split.sizes,
    aten.chunk.default,
    aten.tensor_split.sections,
    aten.tensor_split.indices,
)
def split(call: Call) -> list[Layout]:
    """Consecutive pieces of a dim."""
    x = call.layout("self")
    dim = normalized_dim(call["dim"], len(x))
    start = 0
    pieces: list[Layout] = []
    for shape in call.shapes:
        pieces.append(replaced(x, {dim: _piece(call, x[dim], start, shape[dim])}))
        start += shape[dim]
    return pieces


def _piece(call: Call, dim: Dim, start: int, size: int, step: int = 1) -> Dim:
    if is_position(dim):
        return position(size)
    if is_dynamic(dim_size(dim)):
        call.keep(dim)
        return position(size)
    return call.algebra.taken(dim, slice(start, start + (size - 1) * step + 1, step))


@rule(aten.unbind.int)
def unbind(call: Call) -> list[Layout]:
    """Each element of a dim on its own; all of them stay."""
    x = call.layout("self")
    dim = normalized_dim(call["dim"], len(x))
    call.keep(x[dim])
    return [dropped(x, [dim]) for _ in call.shapes]


@rule(aten.slice.Tensor)
def slice_(call: Call) -> Layout:
    """Some elements of a dim."""
    x = call.layout("self")
    dim = normalized_dim(call["dim"], len(x))
    start = call["start"] or 0
    if is_position(x[dim]):
        return replaced(x, {dim: position(call.shape[dim])})
    if not isinstance(start, int) or not isinstance(call.operation.node.meta["val"].shape[dim], int):
        call.keep(x[dim])
        return replaced(x, {dim: position(call.shape[dim])})
    size = dim_size(x[dim])
    first = min(start % size if start < 0 else start, size)
    return replaced(x, {dim: _piece(call, x[dim], first, call.shape[dim], call["step"])})


@rule(aten.narrow.default)
def narrow(call: Call) -> Layout:
    """Consecutive elements of a dim."""
    x = call.layout("self")
    dim = normalized_dim(call["dim"], len(x))
    if not isinstance(call["start"], int):
        call.keep(x[dim])
        return replaced(x, {dim: position(call.shape[dim])})
    return replaced(x, {dim: _piece(call, x[dim], call["start"], call.shape[dim])})


@rule(aten.select.int)
def select(call: Call) -> Layout:
    """One element of a dim, which stays."""
    x = call.layout("self")
    dim = normalized_dim(call["dim"], len(x))
    if not is_position(x[dim]):
        if not isinstance(call["index"], int) or is_dynamic(dim_size(x[dim])):
            call.keep(x[dim])
        else:
            index = call["index"] % dim_size(x[dim])
            call.algebra.units.freeze(call.algebra.flat(x[dim])[index : index + 1], call.algebra.cause)
    return dropped(x, [dim])


@rule(aten.constant_pad_nd.default, aten.pad.default)
def pad(call: Call) -> Layout:
    """Constant padding adds new elements; other modes need the dim as it is."""
    x = call.layout("self")
    amounts = call["pad"]
    constant = call.operation.arguments.get("mode", "constant") == "constant"
    dims: dict[int, Dim] = {}
    for place in range(len(amounts) // 2):
        dim = len(x) - 1 - place
        before, after = amounts[2 * place : 2 * place + 2]
        if _is_zero(before) and _is_zero(after):
            continue
        literal = isinstance(before, int) and isinstance(after, int) and before >= 0 and after >= 0
        if is_position(x[dim]) or not literal or not constant:
            call.keep(x[dim])
            dims[dim] = position(call.shape[dim])
        else:
            units = call.algebra.units
            around = [elements_of(units.fresh(before)), x[dim], elements_of(units.fresh(after))]
            dims[dim] = call.algebra.concatenated(around)
    return replaced(x, dims)


def _is_zero(amount: Any) -> bool:
    return isinstance(amount, int) and amount == 0


def elements_of(units: Any) -> Dim:
    """A dim of units, also of none or one of them."""
    from fxcompress.passes.channels.layout import Factor

    return (Factor(len(units), units),)


@rule(aten.slice_scatter.default)
def slice_scatter(call: Call) -> Layout:
    """A slice overwritten: its elements are joined with what is written."""
    x, written = call.layout("self"), call.layout("src")
    dim = normalized_dim(call["dim"], len(x))
    for index, (a, b) in enumerate(zip(x, written, strict=True)):
        if index != dim:
            call.join(a, b)
    if is_position(x[dim]) and is_position(written[dim]):
        return x
    start = call["start"] or 0
    if not isinstance(start, int):
        call.keep(x[dim], written[dim])
        return x
    first = start % dim_size(x[dim]) if start < 0 else start
    call.join(_piece(call, x[dim], first, dim_size(written[dim]), call["step"]), written[dim])
    return x


@rule(aten.select_scatter.default)
def select_scatter(call: Call) -> Layout:
    """One entry of a dim overwritten; the dim stays."""
    x, written = call.layout("self"), call.layout("src")
    dim = normalized_dim(call["dim"], len(x))
    call.keep(x[dim])
    for a, b in zip(dropped(x, [dim]), written, strict=True):
        call.join(a, b)
    return x


@rule(aten.meshgrid.default, aten.meshgrid.indexing)
def meshgrid(call: Call) -> list[Layout]:
    """Grids of positions."""
    for layout in call.tensors("tensors"):
        call.keep(*layout)
    return [call.positions(index) for index in range(len(call.shapes))]
