"""Removal: parameters are sliced, modules and calls say the new sizes, permutations become lookups."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from fxcompress.passes.channels import literals
from fxcompress.passes.channels.elements import Survivors
from fxcompress.passes.channels.groups import ChannelReport
from fxcompress.passes.channels.layout import Layout
from fxcompress.passes.channels.rewrites import Edit, Rewrite, read_constant, rewrite_of, scaled_size
from fxcompress.passes.channels.units import Mask
from torch import fx, nn

from fxcompress.ir.dead_code import drop_unread_state, eliminate_dead
from fxcompress.ir.fake import resized, symbolic
from fxcompress.ir.layers import described
from fxcompress.ir.ops import get_module, get_state, operation, overload_of, replace_states
from fxcompress.ir.program import Program

aten = torch.ops.aten

_REGISTERED = literals


def remove(program: Program, report: ChannelReport, removed: Mask) -> None:
    """Takes units out of a Program, in place.

    Args:
        program: The Program that ``report`` is of, with tensors that others may share.
        report: Its channel dependencies.
        removed: For each unit whether it goes, with one ``False`` more at the end.
    """
    root = program.graph_module
    survivors = report.survivors(removed)
    nodes = list(program.nodes)
    for node in nodes:
        _restore_size_reads(node, report, survivors)
    for node in nodes:
        if node.name in report.permutations:
            _permute(root, node, report, survivors)
    for edit, change in list(_edits(root, nodes, report, survivors)):  # all before any: calls may share a module
        change(edit)
    replace_states(root, dict(_sliced_state(root, report, survivors)))
    values = _Values(survivors)
    for node in nodes:
        if node.op == "call_module":
            _restate(get_module(root, str(node.target)))
        values.shrink(node, report.layouts.get(node.name))
    eliminate_dead(program.graph)
    drop_unread_state(root)


def _edits(
    root: fx.GraphModule, nodes: list[fx.Node], report: ChannelReport, survivors: Survivors
) -> Iterator[tuple[Edit, Rewrite]]:
    """What there is to rewrite, with all arguments as they were."""
    for node in nodes:
        if node.name in report.layouts and node.name not in report.permutations:
            overload = overload_of(root, node)
            change = None if overload is None else rewrite_of(overload)
            call = None if change is None else operation(root, node)
            if change is not None and call is not None:
                yield Edit(call, report, survivors, root), change


def _restate(module: nn.Module) -> None:
    """A module's attributes follow its parameters."""
    for attribute, value in described(module).items():
        if getattr(module, attribute) != value:
            setattr(module, attribute, value)


def _sliced_state(
    root: fx.GraphModule, report: ChannelReport, survivors: Survivors
) -> Iterator[tuple[int, torch.Tensor]]:
    buffer = _Buffer()
    for name, layout in report.state.items():
        if survivors.shrinks(*layout):
            tensor = get_state(root, name)
            yield id(tensor), sliced(tensor, [survivors.places(dim) for dim in layout], buffer)


class _Buffer:
    """Room for what is between two slices of a tensor: memory that was written before is faster than new."""

    def __init__(self) -> None:
        self._room: dict[Hashable, torch.Tensor] = {}

    def of(self, like: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """A tensor of a shape, with any values, until the next one is asked for."""
        size, kind = math.prod(shape), (like.dtype, like.device)
        if kind not in self._room or self._room[kind].numel() < size:
            self._room[kind] = like.new_empty(size)
        return self._room[kind][:size].view(shape)


def sliced(tensor: torch.Tensor, places: list[torch.Tensor | None], buffer: _Buffer) -> torch.Tensor:
    """A new tensor with the given places of each dim, ``None`` for all; a parameter stays one."""
    kept = tensor.detach()
    chosen = [(dim, index.to(tensor.device)) for dim, index in enumerate(places) if index is not None]
    for turn, (dim, index) in enumerate(chosen, start=1):
        if turn == 1 < len(chosen):
            between = buffer.of(kept, (*kept.shape[:dim], len(index), *kept.shape[dim + 1 :]))
            kept = torch.index_select(kept, dim, index, out=between)
        else:
            kept = kept.index_select(dim, index)
    return nn.Parameter(kept, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else kept


def _permute(root: fx.GraphModule, node: fx.Node, report: ChannelReport, survivors: Survivors) -> None:
    """A permutation of a dim that shrinks becomes a lookup of what stays."""
    permutation = report.permutations[node.name]
    source = node.args[0]
    for _ in permutation.interior:
        source = source.args[0]  # type: ignore[union-attr]
    assert isinstance(source, fx.Node)
    kept = survivors.dim(report.layouts[source.name][permutation.dim])
    if kept is None:
        return
    places = np.cumsum(kept) - 1
    index = torch.from_numpy(places[permutation.index[kept[permutation.index]]])
    node.target, node.kwargs = aten.index_select.default, {}
    node.args = (source, permutation.dim, read_constant(root, node, index))


def _restore_size_reads(node: fx.Node, report: ChannelReport, survivors: Survivors) -> None:
    """A size read from a dim that shrinks (batch * heads) gives those who use it the size before."""
    if node.target is not aten.sym_size.int:
        return
    source = node.args[0]
    layout: Any = report.layouts.get(str(source))
    if not isinstance(layout, tuple):
        return
    before, after = survivors.ratio(layout[node.args[1]])  # type: ignore[index]
    if before == after:
        return
    users = list(node.users)
    node.meta["val"] = node.meta["val"] // before * after
    old = scaled_size(node.next, node, after, before)
    for user in users:
        user.replace_input_with(node, old)


class _Values:
    """Fake tensors of the shapes after removal; nodes of one shape share one."""

    def __init__(self, survivors: Survivors) -> None:
        self._survivors = survivors
        self._known: dict[Hashable, torch.Tensor] = {}

    def shrink(self, node: fx.Node, layout: Any) -> None:
        """Gives a node the value of the new shape."""
        value = node.meta.get("val")
        if isinstance(layout, list) and isinstance(value, (list, tuple)):
            node.meta["val"] = type(value)(map(self._shrunk, value, layout))
        elif isinstance(layout, tuple) and isinstance(value, torch.Tensor):
            node.meta["val"] = self._shrunk(value, layout)

    def _shrunk(self, value: torch.Tensor, layout: Layout) -> torch.Tensor:
        if not self._survivors.shrinks(*layout):
            return value
        shape = list(map(self._survivors.shrunk, value.shape, layout))
        key = (tuple(map(symbolic, shape)), value.dtype, value.device)
        if key not in self._known:
            self._known[key] = resized(value, shape)
        return self._known[key]
