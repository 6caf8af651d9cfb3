"""Padding with what is at the other end, as slices joined: OpenVINO has no such mode, ExecuTorch fixes its sizes."""

from __future__ import annotations

import sys

import torch
from torch import fx

from fxcompress.engines.valued_call import valued_call
from fxcompress.ir.ops import bind

aten = torch.ops.aten


def join_circular_pads(graph: fx.Graph) -> None:
    """Rewrites, in place, circular padding by amounts that are known; negative ones cut."""
    for node in graph.find_nodes(op="call_function", target=aten.pad.default):
        arguments = bind(aten.pad.default, node.args, node.kwargs)
        if arguments["mode"] == "circular" and all(isinstance(amount, int) for amount in arguments["pad"]):
            with graph.inserting_before(node):
                node.replace_all_uses_with(_joined(graph, arguments["self"], arguments["pad"]))
            graph.erase_node(node)


def _joined(graph: fx.Graph, value: fx.Node, pad: list[int]) -> fx.Node:
    for dim, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True), 1):
        if min(before, after) < 0:
            end = min(after, 0) or sys.maxsize
            value = valued_call(graph, aten.slice.Tensor, value, -dim, max(-before, 0), end)
        first = [valued_call(graph, aten.slice.Tensor, value, -dim, -before)] if before > 0 else []
        last = [valued_call(graph, aten.slice.Tensor, value, -dim, 0, after)] if after > 0 else []
        if first or last:
            value = valued_call(graph, aten.cat.default, [*first, value, *last], -dim)
    return value
