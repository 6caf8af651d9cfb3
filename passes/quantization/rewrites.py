"""Operators written the way an engine looks for them: attention as products, linear layers with two dims, and more."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from fxcompress.ir.fake import symbolic
from fxcompress.ir.ops import Operation

aten = torch.ops.aten


class _Writer:
    """Makes nodes before an operation, in its name for reports."""

    def __init__(self, call: Operation) -> None:
        self._node = call.node
        self._mode = call.node.meta["val"].fake_mode

    def __call__(self, target: Any, *args: Any) -> fx.Node:
        made = self._node.graph.call_function(target, args)
        made.meta = {**self._node.meta}
        with self._mode:
            made.meta["val"] = target(*fx.node.map_arg(args, lambda node: node.meta["val"]))
        return made

    def size(self, source: fx.Node, dim: int) -> int | fx.Node:
        """A size of a value: a number, or a node where it is dynamic, one for all that have the same size."""
        found = source.meta["val"].shape[dim]
        if isinstance(found, int):
            return found
        known: fx.Node
        for known in self._node.graph.find_nodes(op="call_function", target=aten.sym_size.int):
            if symbolic(known.meta["val"]) == symbolic(found):
                return known
        return self(aten.sym_size.int, source, dim % source.meta["val"].dim())


@contextmanager
def _in_place_of(call: Operation) -> Iterator[_Writer]:
    with call.node.graph.inserting_before(call.node):
        yield _Writer(call)


def split_attention(call: Operation) -> bool:
    """Writes attention as ``softmax(query * scale @ key.T + mask) @ value``; leaves it alone where it has dropout.

    Rows that may see nothing give 0, as in PyTorch. Heads that share keys and values stay one dim more, so that nothing
    is copied.
    """
    if call["dropout_p"]:
        return False
    query, key, value, mask = (call.operand(name) for name in ("query", "key", "value", "attn_mask"))
    scale = call["scale"]
    if scale is None:
        scale = 1 / math.sqrt(query.meta["val"].shape[-1])
    with _in_place_of(call) as write:
        if call["is_causal"]:
            mask = _causal(write, query, key)
        heads, shared = (x.meta["val"].shape[-3] if x.meta["val"].dim() > 2 else 1 for x in (query, key))
        grouped = heads != shared
        if grouped:
            query = write(aten.unflatten.int, query, -3, [shared, heads // shared])
            key, value = (write(aten.unsqueeze.default, x, -3) for x in (key, value))
            mask = _grouped_mask(write, mask, shared)
        turned = write(aten.transpose.int, key, -2, -1)
        scores = write(aten.matmul.default, write(aten.mul.Tensor, query, scale), turned)
        result = write(aten.matmul.default, _weights(write, scores, mask), value)
        if grouped:
            result = write(aten.flatten.using_ints, result, -4, -3)
    call.node.replace_all_uses_with(result)
    call.node.graph.erase_node(call.node)
    return True


def _causal(write: _Writer, query: fx.Node, key: fx.Node) -> fx.Node:
    device = query.meta["val"].device
    rows, columns = (write(aten.arange.default, write.size(x, -2)) for x in (query, key))
    if device.type != "cpu":
        rows, columns = (write(aten.to.device, x, device, torch.int64) for x in (rows, columns))
    return write(aten.ge.Tensor, write(aten.unsqueeze.default, rows, -1), columns)


def _grouped_mask(write: _Writer, mask: fx.Node | None, shared: int) -> fx.Node | None:
    if mask is None or mask.meta["val"].dim() < 3:
        return mask
    heads = mask.meta["val"].shape[-3]
    if heads == 1:
        return write(aten.unsqueeze.default, mask, -3)
    return write(aten.unflatten.int, mask, -3, [shared, heads // shared])


def _weights(write: _Writer, scores: fx.Node, mask: fx.Node | None) -> fx.Node:
    """What is attended to. A finite number stands for minus infinity, so that no row is without a softmax."""
    if mask is None:
        return write(aten.softmax.int, scores, -1)
    least = torch.finfo(scores.meta["val"].dtype).min
    if mask.meta["val"].dtype == torch.bool:
        seen = mask
        scores = write(aten.where.ScalarOther, seen, scores, least)
    else:
        seen = write(aten.gt.Scalar, mask, -math.inf)
        scores = write(aten.add.Tensor, scores, write(aten.clamp.default, mask, least))
    return write(aten.where.ScalarOther, seen, write(aten.softmax.int, scores, -1), 0.0)


def split_gate(call: Operation, gate: OpOverload) -> bool:
    """Writes an activation such as SiLU as the product of what it reads and the gate that it computes of that."""
    (source,) = call.node.all_input_nodes
    with _in_place_of(call) as write:
        result = write(aten.mul.Tensor, source, write(gate, source))
    call.node.replace_all_uses_with(result)
    call.node.graph.erase_node(call.node)
    return True


def pool_mean(call: Operation) -> bool:
    """Writes the mean of each channel of an image as an average pool over the whole of it."""
    source = call.node.args[0]
    assert isinstance(source, fx.Node)
    value = source.meta["val"]
    if value.dim() != 4 or not all(isinstance(size, int) for size in value.shape[2:]) or not _is_mean(call):
        return False
    with _in_place_of(call) as write:
        result = write(aten.avg_pool2d.default, source, list(value.shape[2:]))
        if call.node.meta["val"].dim() == 2:
            result = write(aten.flatten.using_ints, result, 1)
    call.node.replace_all_uses_with(result)
    call.node.graph.erase_node(call.node)
    return True


def _is_mean(call: Operation) -> bool:
    """Whether a call gives the mean of each channel of an image."""
    if call.overload is aten.adaptive_avg_pool2d.default:
        return list(call["output_size"]) == [1, 1]
    if call.overload is not aten.mean.dim or call["dtype"] is not None:
        return False
    return sorted(dim % 4 for dim in call["dim"] or ()) == [2, 3]


def slice_channels(call: Operation) -> bool:
    """Writes pieces of the channels of an image as slices."""
    source = call.node.args[0]
    assert isinstance(source, fx.Node)
    users = list(call.node.users)
    if source.meta["val"].dim() != 4 or call["dim"] % 4 != 1:
        return False
    sizes = [piece.shape[1] for piece in call.node.meta["val"]]
    if not all(isinstance(size, int) for size in sizes) or any(user.target is not operator.getitem for user in users):
        return False
    ends = list(itertools.accumulate(sizes))
    for user in users:
        taken: Any = user.args[1]
        index = taken % len(ends)
        with call.node.graph.inserting_before(user):
            made = call.node.graph.call_function(
                aten.slice.Tensor, (source, 1, ends[index] - sizes[index], ends[index])
            )
        made.meta = {**user.meta}
        user.replace_all_uses_with(made)
        call.node.graph.erase_node(user)
    call.node.graph.erase_node(call.node)
    return True


def slice_roll(call: Operation) -> bool:
    """Writes a roll as concatenations of slices."""
    source = call.node.args[0]
    assert isinstance(source, fx.Node)
    shape, dims = source.meta["val"].shape, call["dims"]
    shifts = [(shift, dim, shape[dim]) for shift, dim in zip(call["shifts"], dims, strict=bool(dims))]
    if not all(isinstance(number, int) for shift in shifts for number in shift):
        return False
    starts = [(dim, size, -shift % size) for shift, dim, size in shifts if size and shift % size]
    if not starts:
        return False
    with _in_place_of(call) as write:
        for dim, size, start in starts:
            pieces = [write(aten.slice.Tensor, source, dim, *ends) for ends in ((start, size), (0, start))]
            source = write(aten.cat.default, pieces, dim)
    call.node.replace_all_uses_with(source)
    call.node.graph.erase_node(call.node)
    return True


def flatten_rows(call: Operation) -> bool:
    """Gives a linear layer an input of two dims, and its result the shape that it had."""
    source = call.node.args[0]
    assert isinstance(source, fx.Node)
    dims = source.meta["val"].dim()
    if dims == 2:
        return False
    result = call.node.meta["val"]
    with _in_place_of(call) as write:
        flat = write(aten.reshape.default, source, [-1, source.meta["val"].shape[-1]])
        outer = _outer_sizes(write, source)
    call.node.update_arg(0, flat)
    call.node.meta["val"] = result.reshape(-1, result.shape[-1])
    with call.node.graph.inserting_after(call.node):
        restored = call.node.graph.call_function(aten.view.default, (call.node, [*outer, result.shape[-1]]))
    restored.meta = {**call.node.meta, "val": result}
    call.node.replace_all_uses_with(restored, lambda user: user is not restored)
    return True


def _outer_sizes(write: _Writer, source: fx.Node) -> list[int | fx.Node]:
    """All sizes but the last; a single dynamic one is left for the view to find out."""
    *outer, _ = source.meta["val"].shape
    dynamic = [index for index, size in enumerate(outer) if not isinstance(size, int)]
    inferred = dynamic[0] if len(dynamic) == 1 else None
    return [-1 if dim == inferred else write.size(source, dim) for dim in range(len(outer))]
