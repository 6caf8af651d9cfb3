"""Operators that look elements up: embedding, index, gather, scatter."""

from __future__ import annotations

import torch
from fxcompress.passes.channels.layout import Layout, broadcast, is_position
from fxcompress.passes.channels.rules import Call, normalized_dim, replaced, rule
from torch import fx

aten = torch.ops.aten


@rule(aten.embedding.default)
def embedding(call: Call) -> Layout:
    """Rows are looked up by data, so all stay."""
    weight, indices = call.layout("weight"), call.layout("indices")
    call.keep(weight[0])
    return (*indices, weight[1])


@rule(aten.index_select.default)
def index_select(call: Call) -> Layout:
    """Elements of a dim by number: it stays."""
    x, index = call.layout("self"), call.layout("index")
    dim = normalized_dim(call["dim"], len(x))
    call.keep(x[dim])
    return replaced(x, {dim: index[0] if index else ()})


@rule(aten.index.Tensor)
def index(call: Call) -> Layout:
    """Indexed dims stay; the dims of the indices come in their place (first, where they are apart)."""
    x = call.layout("self")
    places = [place for place, value in enumerate(call["indices"]) if value is not None]
    indices = [call.layouts[node] for node in call["indices"] if isinstance(node, fx.Node)]
    if _is_mask(call, places):
        call.keep(*(dim for layout in indices for dim in layout), *x[: len(x)])
        return call.positions()
    call.keep(*(x[place] for place in places))
    looked_up = broadcast(call.algebra, indices)
    rest = [dim for place, dim in enumerate(x) if place not in places]
    together = places == list(range(places[0], places[-1] + 1))
    at = places[0] if together else 0
    return (*rest[:at], *looked_up, *rest[at:])


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


@rule(aten.scatter.src, aten.scatter.value, aten.scatter_add.default, aten.index_put.default, aten.index_add.default,
      aten.masked_scatter.default, aten.scatter_reduce.two, aten.index_copy.default)  # fmt: skip
def scatter(call: Call) -> Layout:
    """Writes by number: everything stays."""
    for layout in call.operands():
        call.keep(*layout)
    return call.positions()


@rule(aten.one_hot.default, aten.nonzero.default, aten.bincount.default, aten.histc.default)
def numbered(call: Call) -> Layout:
    """Numbers become places."""
    for layout in call.operands():
        call.keep(*layout)
    return call.positions()
