"""Pure permutations of one dim: channel shuffles (arXiv:1707.01083), also written as reshape, transpose, reshape.

Taken apart, they make every channel a product of (group, place), and each further shuffle doubles that. Taken as one,
they only reorder units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from fxcompress.passes.channels.layout import Sizes
from fxcompress.passes.channels.units import Array
from torch import fx

from fxcompress.ir.ops import bind

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Permutation:
    """A dim whose elements change places.

    Attributes:
        source: What is permuted.
        dim: Which dim of it.
        index: Element ``i`` of the result is element ``index[i]`` of the source.
        interior: The nodes in between, which nothing else reads.
    """

    source: fx.Node
    dim: int
    index: Array
    interior: tuple[fx.Node, ...]


def permutations(graph: fx.Graph, sizes: Sizes) -> dict[fx.Node, Permutation]:
    """Last node of each permutation -> what it does."""
    found = {}
    for node in graph.find_nodes(op="call_function", target=aten.reshape.default):
        permutation = _permutation(node, sizes)
        if permutation is not None:
            found[node] = permutation
    for node in graph.find_nodes(op="call_function", target=aten.channel_shuffle.default):
        found[node] = _channel_shuffle(node, sizes)
    return found


def _channel_shuffle(node: fx.Node, sizes: Sizes) -> Permutation:
    call = bind(node.target, node.args, node.kwargs)  # type: ignore[arg-type]
    channels = sizes.shape(node.meta["val"])[1]
    return Permutation(call["self"], 1, np.arange(channels).reshape(call["groups"], -1).T.reshape(-1), ())


def _permutation(last: fx.Node, sizes: Sizes) -> Permutation | None:
    middle = last.args[0]
    order = _order(middle)
    if order is None or len(middle.users) != 1:  # type: ignore[union-attr]
        return None
    first = middle.args[0]  # type: ignore[union-attr]
    if not isinstance(first, fx.Node) or first.target is not aten.reshape.default or len(first.users) != 1:
        return None
    source = first.args[0]
    assert isinstance(source, fx.Node)
    assert isinstance(middle, fx.Node)
    outer, inner = sizes.shape(source.meta["val"]), sizes.shape(first.meta["val"])
    if sizes.shape(last.meta["val"]) != outer or order == sorted(order):
        return None
    moved = [index for index, place in enumerate(order) if index != place]
    low, high = min(moved), max(moved) + 1
    if sorted(order[low:high]) != list(range(low, high)) or len(inner) - (high - low) + 1 != len(outer):
        return None
    block = inner[low:high]
    if (*inner[:low], int(np.prod(block)), *inner[high:]) != outer or np.prod(block) > 1 << 22:
        return None
    if not isinstance(source.meta["val"].shape[low], int):
        return None
    index = np.arange(int(np.prod(block))).reshape(block).transpose([place - low for place in order[low:high]])
    return Permutation(source, low, index.reshape(-1), (first, middle))


def _order(node: Any) -> list[int] | None:
    """Dims of the operand in the order of the result, where a node permutes dims."""
    if not isinstance(node, fx.Node) or node.target not in (aten.permute.default, aten.transpose.int):
        return None
    source: Any = node.args[0]
    rank = source.meta["val"].dim()
    call = bind(node.target, node.args, node.kwargs)
    if "dims" in call:
        return [dim % rank for dim in call["dims"]]
    order = list(range(rank))
    a, b = call["dim0"] % rank, call["dim1"] % rank
    order[a], order[b] = order[b], order[a]
    return order
