"""Rewrites of the operators that spell sizes, bounds, groups or constants that follow from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from fxcompress.passes.channels.families.indexing import numbers, rolled
from fxcompress.passes.channels.layout import Dim, dim_size
from fxcompress.passes.channels.rewrites import Edit, rewrite
from fxcompress.passes.channels.rules import normalized_dim
from fxcompress.passes.channels.units import Array, Mask

from fxcompress.ir.ops import get_state

aten = torch.ops.aten


def _set_sizes(edit: Edit, name: str) -> None:
    sizes = edit[name]
    new = [edit.size(dim, size) for dim, size in zip(edit.result, sizes, strict=True)]
    if new != list(sizes):
        edit.set(name, new)


@rewrite(aten.reshape.default, aten.expand.default, aten.full.default, aten.zeros.default, aten.ones.default,
         aten.new_zeros.default, aten.new_full.default, aten.new_ones.default)  # fmt: skip
def sized(edit: Edit) -> None:
    """The size of the result, dim by dim."""
    _set_sizes(edit, "shape" if "shape" in edit.operation.arguments else "size")


@rewrite(aten.unflatten.int)
def unflatten(edit: Edit) -> None:
    """The sizes of the dims that one becomes."""
    dim = normalized_dim(edit["dim"], len(edit.layout("self")))
    dims = edit.result[dim : dim + len(edit["sizes"])]
    edit.set("sizes", [edit.size(part, size) for part, size in zip(dims, edit["sizes"], strict=True)])


@rewrite(
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.split.sizes,
    aten.chunk.default,
    aten.tensor_split.sections,
    aten.tensor_split.indices,
)
def split(edit: Edit) -> None:
    """Pieces get sizes of their own."""
    x = edit.layout("self")
    dim = normalized_dim(edit["dim"], len(x))
    if edit.shrinks(x[dim]):
        pieces = [edit.count(piece[dim]) for piece in edit.results]
        edit.replace(aten.split_with_sizes.default, edit.operand("self"), pieces, edit["dim"])


def _before(kept: Mask, place: int) -> int:
    return int(kept[:place].sum())


def _bounds(edit: Edit, dim: Dim) -> tuple[int, int]:
    size, start, end = dim_size(dim), edit["start"], edit["end"]
    first, last, _ = slice(start, end).indices(size)
    return first, max(first, last)


@rewrite(aten.slice.Tensor)
def slice_(edit: Edit) -> None:
    """Bounds move; a slice with a step becomes a lookup."""
    x = edit.layout("self")
    dim = normalized_dim(edit["dim"], len(x))
    kept = edit.kept(x[dim])
    if kept is None:
        return
    first, last = _bounds(edit, x[dim])
    if edit["step"] == 1:
        edit.replace(aten.slice.Tensor, edit.operand("self"), edit["dim"], _before(kept, first), _before(kept, last))
        return
    chosen = np.arange(first, last, edit["step"])
    look_up(edit, edit.operand("self"), dim, kept, chosen[kept[chosen]])


def look_up(edit: Edit, source: Any, dim: int, kept: Mask, chosen: Any) -> None:
    """Makes the call a lookup of the elements that were at ``chosen`` before removal."""
    places = np.cumsum(kept) - 1
    values = torch.from_numpy(places[chosen])
    edit.replace(aten.index_select.default, source, dim, edit.constant(values))


@rewrite(aten.narrow.default)
def narrow(edit: Edit) -> None:
    """Start and length move."""
    x = edit.layout("self")
    dim = normalized_dim(edit["dim"], len(x))
    kept = edit.kept(x[dim])
    if kept is not None:
        edit.set("start", _before(kept, edit["start"]))
        edit.set("length", edit.count(edit.result[dim]))


@rewrite(aten.select.int)
def select(edit: Edit) -> None:
    """The number of the element moves."""
    x = edit.layout("self")
    dim = normalized_dim(edit["dim"], len(x))
    kept = edit.kept(x[dim])
    if kept is not None:
        edit.set("index", _before(kept, edit["index"] % len(kept)))


@rewrite(aten.slice_scatter.default)
def slice_scatter(edit: Edit) -> None:
    """Bounds move; with a step, elements are written where those that stay are now."""
    x = edit.layout("self")
    dim = normalized_dim(edit["dim"], len(x))
    kept = edit.kept(x[dim])
    if kept is None:
        return
    first, last = _bounds(edit, x[dim])
    if edit["step"] == 1:
        edit.set("start", _before(kept, first))
        edit.set("end", _before(kept, last))
        return
    chosen = np.arange(first, last, edit["step"])
    places = torch.from_numpy((np.cumsum(kept) - 1)[chosen[kept[chosen]]])
    edit.replace(aten.index_copy.default, edit.operand("self"), dim, edit.constant(places), edit.operand("src"))


@rewrite(aten.constant_pad_nd.default, aten.pad.default)
def pad(edit: Edit) -> None:
    """As many elements are added as stay."""
    x, amounts = edit.layout("self"), list(edit["pad"])
    for place in range(len(amounts) // 2):
        dim = len(x) - 1 - place
        kept = edit.kept(edit.result[dim])
        if kept is not None and isinstance(amounts[2 * place], int):
            before = amounts[2 * place]
            amounts[2 * place] = _before(kept, before)
            amounts[2 * place + 1] = int(kept[before + dim_size(x[dim]) :].sum())
    if amounts != list(edit["pad"]):
        edit.set("pad", amounts)


@rewrite(
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
    aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding,
    aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input,
    "torchvision::deform_conv2d",
)  # fmt: skip
def convolution(edit: Edit) -> None:
    """As many groups as stay."""
    if isinstance(edit["groups"], int) and edit["groups"] > 1:
        edit.set("groups", edit.rows(edit.layout("weight")[0], edit["groups"]))


@rewrite(aten.group_norm.default)
def group_norm(edit: Edit) -> None:
    """As many groups as stay."""
    channels = edit.layout("input")[1]
    edit.set("num_groups", edit.rows(channels, edit["num_groups"]))
    if edit.operation.module is not None:
        edit.set("num_channels", edit.count(channels))


@rewrite(aten.batch_norm.default, aten.instance_norm.default)
def batch_norm(edit: Edit) -> None:
    """The module's number of features."""
    if edit.operation.module is not None:
        edit.set("num_features", edit.count(edit.layout("input")[1]))


@rewrite(aten.layer_norm.default, aten.rms_norm.default)
def layer_norm(edit: Edit) -> None:
    """The sizes of the dims that are normalised over."""
    shape = edit["normalized_shape"]
    dims = edit.result[len(edit.result) - len(shape) :]
    if edit.shrinks(*dims):
        edit.set("normalized_shape", [edit.size(dim, size) for dim, size in zip(dims, shape, strict=True)])


@rewrite(aten.scaled_dot_product_attention.default)
def attention(edit: Edit) -> None:
    """The default scale is that of the head dim before."""
    head = edit.layout("query")[-1]
    if edit["scale"] is None and edit.shrinks(head):
        edit.set("scale", 1 / math.sqrt(dim_size(head)))


@rewrite(aten.repeat_interleave.self_int)
def repeat_interleave(edit: Edit) -> None:
    """As many copies as stay; they are the innermost factor of the result."""
    if edit["dim"] is not None and isinstance(edit["repeats"], int):
        dim = normalized_dim(edit["dim"], len(edit.result))
        edit.set("repeats", edit.count(edit.result[dim][len(edit.layout("self")[dim]) :]))


@rewrite(aten.repeat.default, aten.tile.default)
def repeat(edit: Edit) -> None:
    """As many copies as stay; they are the outermost factor of the result."""
    name = "repeats" if "repeats" in edit.operation.arguments else "dims"
    x, times = edit.layout("self"), list(edit[name])
    padded = [()] * (len(edit.result) - len(x)) + list(x)
    for place in range(1, len(times) + 1):
        copies = edit.result[-place][: len(edit.result[-place]) - len(padded[-place])]
        times[-place] = edit.size(copies, times[-place]) if copies else times[-place]
    if times != list(edit[name]):
        edit.set(name, times)


@rewrite(aten.index_select.default)
def index_select(edit: Edit) -> None:
    """Constant numbers of elements move."""
    dim = normalized_dim(edit["dim"], len(edit.layout("self")))
    _move(edit, dim, lambda size: numbers(edit["index"]))


@rewrite(aten.index.Tensor)
def index(edit: Edit) -> None:
    """Constant numbers of elements move."""
    (place, node), *others = [(place, node) for place, node in enumerate(edit["indices"]) if node is not None]
    if not others and node.op == "get_attr":
        _move(edit, place, lambda size: numbers(get_state(edit.root, str(node.target))))


@rewrite(aten.roll.default)
def roll(edit: Edit) -> None:
    """The order of what stays becomes a lookup."""
    if len(edit["dims"]) == 1 and isinstance(edit["shifts"][0], int):
        dim = normalized_dim(edit["dims"][0], len(edit.layout("self")))
        _move(edit, dim, lambda size: rolled(size, edit["shifts"][0]))


def _move(edit: Edit, dim: int, order: Callable[[int], Array]) -> None:
    kept = edit.kept(edit.layout("self")[dim])
    if kept is not None:
        chosen = order(len(kept))
        look_up(edit, edit.operand("self"), dim, kept, chosen[kept[chosen]])
