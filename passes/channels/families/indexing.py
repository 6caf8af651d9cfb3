"""Operators that look elements up: embedding, index, gather, scatter."""

from __future__ import annotations

import numpy as np
import torch
from fxcompress.passes.channels.layout import Dim, Layout, broadcast, dim_size, is_position
from fxcompress.passes.channels.rules import Call, normalized_dim, replaced, rule
from fxcompress.passes.channels.units import Array
from torch import fx

aten = torch.ops.aten


@rule(aten.embedding.default)
def embedding(call: Call) -> Layout:
    """Rows are looked up by data, so all stay."""
    weight, indices = call.layout("weight"), call.layout("indices")
    call.keep(weight[0])
    return (*indices, weight[1])


@rule(aten.embedding_bag.default, aten.embedding_bag.padding_idx)
def embedding_bag(call: Call) -> list[Layout]:
    """Rows are looked up by data and reduced to one a bag; the other results are about rows."""
    weight = call.layout("weight")
    call.keep(weight[0])
    return [(call.positions()[0], weight[1]), *(call.positions(index) for index in range(1, len(call.shapes)))]


@rule(aten.index_select.default)
def index_select(call: Call) -> Layout:
    """Elements of a dim by number: numbers that are data keep them all, constant ones take units along."""
    x = call.layout("self")
    dim = normalized_dim(call["dim"], len(x))
    constant = call.constant(call.operand("index"))
    if constant is not None and constant.dim() == 1 and not is_position(x[dim]):
        return replaced(x, {dim: call.algebra.taken(x[dim], constant.cpu().numpy())})
    index = call.layout("index")
    call.keep(x[dim])
    return replaced(x, {dim: index[0] if index else ()})


@rule(aten.index.Tensor)
def index(call: Call) -> Layout:
    """Indexed dims stay; the dims of the indices come in their place (first, where they are apart)."""
    x = call.layout("self")
    places = [place for place, value in enumerate(call["indices"]) if value is not None]
    constant = call.constant(call["indices"][places[0]])
    if len(places) == 1 and constant is not None and constant.dim() == 1 and not is_position(x[places[0]]):
        return replaced(x, {places[0]: call.algebra.taken(x[places[0]], numbers(constant))})
    if _is_mask(call, places):
        return call.barrier()  # type: ignore[return-value]
    return _looked_up(call, x, places)


def _looked_up(call: Call, x: Layout, places: list[int]) -> Layout:
    """The layout of what indices of some dims find."""
    indices = [call.layouts[node] for node in call["indices"] if isinstance(node, fx.Node)]
    call.keep(*(x[place] for place in places))
    looked_up = broadcast(call.algebra, indices)
    rest = [dim for place, dim in enumerate(x) if place not in places]
    together = places == list(range(places[0], places[-1] + 1))
    at = places[0] if together else 0
    return (*rest[:at], *looked_up, *rest[at:])


def numbers(index: torch.Tensor) -> Array:
    """An index of one dim as numbers of elements."""
    plain = index.cpu().numpy()
    found: Array = np.flatnonzero(plain) if index.dtype in (torch.bool, torch.uint8) else plain
    return found


@rule(aten.flip.default)
def flip(call: Call) -> Layout:
    """Elements in reverse order."""
    x = call.layout("self")
    dims = {normalized_dim(dim, len(x)) for dim in call["dims"]}
    return tuple(_moved(call, x[dim], slice(None, None, -1)) if dim in dims else x[dim] for dim in range(len(x)))


@rule(aten.roll.default)
def roll(call: Call) -> Layout:
    """Elements of a dim move on, the last come first; of several dims at once only places do."""
    x = call.layout("self")
    dims = [normalized_dim(dim, len(x)) for dim in call["dims"]]
    if len(dims) == 1 and isinstance(call["shifts"][0], int) and not is_position(x[dims[0]]):
        return replaced(x, {dims[0]: _moved(call, x[dims[0]], rolled(dim_size(x[dims[0]]), call["shifts"][0]))})
    call.keep(*(x[dim] for dim in dims or range(len(x))))
    return x


def rolled(size: int, shift: int) -> Array:
    """Where the elements of a rolled dim were before."""
    return np.roll(np.arange(size), shift)


def _moved(call: Call, dim: Dim, order: Array | slice) -> Dim:
    return dim if is_position(dim) else call.algebra.taken(dim, order)


def _is_mask(call: Call, places: list[int]) -> bool:
    return any(call["indices"][place].meta["val"].dtype in (torch.bool, torch.uint8) for place in places)


@rule(aten.gather.default)
def gather(call: Call) -> Layout:
    """Elements along a dim by number; the other dims must match."""
    x, index = call.layout("self"), call.layout("index")
    dim = normalized_dim(call["dim"], len(x))
    call.keep(x[dim])
    for place, (a, b) in enumerate(zip(x, index, strict=True)):
        if place != dim:
            if is_position(b) and not is_position(a):
                call.keep(a)
            elif a and b:
                call.join(a, b)
    return index


@rule(aten.scatter.src, aten.scatter.value, aten.scatter_add.default, aten.scatter_reduce.two)
def scatter(call: Call) -> Layout:
    """Writes along a dim by number: it stays; the other dims must match where all of them are written."""
    x = call.layout("self")
    written = [call.layout("index"), *([call.layout("src")] if "src" in call.operation.arguments else [])]
    _written(call, x, written, normalized_dim(call["dim"], len(x)))
    return x


@rule(aten.index_add.default, aten.index_copy.default)
def index_add(call: Call) -> Layout:
    """Whole entries of a dim are written by number: it stays, the other dims match."""
    x = call.layout("self")
    call.keep(*call.layout("index"))
    _written(call, x, [call.layout("source")], normalized_dim(call["dim"], len(x)))
    return x


def _written(call: Call, x: Layout, written: list[Layout], along: int) -> None:
    for other in written:
        call.keep(x[along], other[along])
        for place, (a, b) in enumerate(zip(x, other, strict=True)):
            if place != along and dim_size(a) == dim_size(b):
                call.join(a, b)
            elif place != along:
                call.keep(a, b)


@rule(aten.index_put.default)
def index_put(call: Call) -> Layout:
    """Indexed dims stay; the others meet those of the values, as in a lookup."""
    x = call.layout("self")
    places = [place for place, value in enumerate(call["indices"]) if value is not None]
    if _is_mask(call, places):
        return call.barrier()  # type: ignore[return-value]
    broadcast(call.algebra, [_looked_up(call, x, places), call.layout("values")])
    return x


@rule(aten.masked_scatter.default)
def masked_scatter(call: Call) -> Layout:
    """Values are taken in order, so everything stays."""
    return call.barrier()  # type: ignore[return-value]


@rule(aten.one_hot.default, aten.nonzero.default, aten.bincount.default, aten.histc.default)
def numbered(call: Call) -> Layout:
    """Numbers become places."""
    for layout in call.operands():
        call.keep(*layout)
    return call.positions()
