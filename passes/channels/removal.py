"""Removal: parameters are sliced, modules and calls say the new sizes, permutations become lookups."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from fxcompress.passes.channels import literals
from fxcompress.passes.channels.groups import ChannelReport
from fxcompress.passes.channels.layout import Dim, Layout
from fxcompress.passes.channels.rewrites import Edit, read_constant, rewrite_of, scaled_size
from fxcompress.passes.channels.units import Mask
from torch import fx, nn

from fxcompress.ir.dead_code import drop_unread_state, eliminate_dead
from fxcompress.ir.layers import described
from fxcompress.ir.ops import operation, replace_states
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
    nodes = list(program.nodes)
    for node in nodes:
        _restore_size_reads(node, report, removed)
    for node in nodes:
        call = operation(root, node)
        if node.name in report.permutations:
            _permute(root, node, report, removed)
        elif call is not None and node.name in report.layouts:
            change = rewrite_of(call.overload)
            if change is not None:
                change(Edit(call, report, removed, root))
    replace_states(root, dict(_sliced_state(root, report, removed)))
    for node in nodes:
        if node.op == "call_module":
            module = root.get_submodule(str(node.target))
            for attribute, value in described(module).items():
                setattr(module, attribute, value)
        _shrink_value(node, report, removed)
    eliminate_dead(program.graph)
    drop_unread_state(root)


def _sliced_state(root: fx.GraphModule, report: ChannelReport, removed: Mask) -> Iterator[tuple[int, torch.Tensor]]:
    named = (*root.named_parameters(), *root.named_buffers())
    for name, tensor in named:
        masks = [report.kept_elements(dim, removed) for dim in report.state.get(name, ())]
        if any(mask is not None for mask in masks):
            yield id(tensor), sliced(tensor, masks)


def sliced(tensor: torch.Tensor, masks: list[Mask | None]) -> torch.Tensor:
    """A new tensor with what the masks keep of each dim; a parameter stays one."""
    kept = tensor.detach()
    for dim, mask in enumerate(masks):
        if mask is not None:
            index = torch.from_numpy(np.flatnonzero(mask)).to(tensor.device)
            kept = kept.index_select(dim, index)
    return nn.Parameter(kept, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else kept


def _permute(root: fx.GraphModule, node: fx.Node, report: ChannelReport, removed: Mask) -> None:
    """A permutation of a dim that shrinks becomes a lookup of what stays."""
    permutation = report.permutations[node.name]
    source = node.args[0]
    for _ in permutation.interior:
        source = source.args[0]  # type: ignore[union-attr]
    assert isinstance(source, fx.Node)
    kept = report.kept_elements(report.layouts[source.name][permutation.dim], removed)
    if kept is None:
        return
    places = np.cumsum(kept) - 1
    index = torch.from_numpy(places[permutation.index[kept[permutation.index]]])
    node.target, node.kwargs = aten.index_select.default, {}
    node.args = (source, permutation.dim, read_constant(root, node, index))


def _restore_size_reads(node: fx.Node, report: ChannelReport, removed: Mask) -> None:
    """A size read from a dim that shrinks (batch * heads) gives those who use it the size before."""
    if node.target is not aten.sym_size.int:
        return
    source = node.args[0]
    layout: Any = report.layouts.get(str(source))
    if not isinstance(layout, tuple):
        return
    before, after = _ratio(layout[node.args[1]], report, removed)  # type: ignore[index]
    if before == after:
        return
    users = list(node.users)
    node.meta["val"] = node.meta["val"] // before * after
    old = scaled_size(node.next, node, after, before)
    for user in users:
        user.replace_input_with(node, old)


def _ratio(dim: Dim, report: ChannelReport, removed: Mask) -> tuple[int, int]:
    before = after = 1
    for factor, mask in zip(dim, report.kept(dim, removed), strict=True):
        if mask is not None:
            before, after = before * factor.size, after * int(mask.sum())
    return before, after


def _shrink_value(node: fx.Node, report: ChannelReport, removed: Mask) -> None:
    """The fake tensor of a node gets the new shape."""
    layout = report.layouts.get(node.name)
    value = node.meta.get("val")
    if isinstance(layout, list) and isinstance(value, (list, tuple)):
        shrunk = [_shrunk(item, each, report, removed) for item, each in zip(value, layout, strict=True)]
        node.meta["val"] = type(value)(shrunk)
    elif isinstance(layout, tuple) and isinstance(value, torch.Tensor):
        node.meta["val"] = _shrunk(value, layout, report, removed)


def _shrunk(value: torch.Tensor, layout: Layout, report: ChannelReport, removed: Mask) -> torch.Tensor:
    ratios = [_ratio(dim, report, removed) for dim in layout]
    if all(before == after for before, after in ratios):
        return value
    shape = [size // before * after for size, (before, after) in zip(value.shape, ratios, strict=True)]
    return value.new_empty(shape)
