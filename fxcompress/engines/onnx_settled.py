"""Writes operators the way that torch.onnx can take them."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from fxcompress.engines.circular_pad import join_circular_pads
from fxcompress.engines.integers import is_call
from fxcompress.engines.valued_call import valued_call
from fxcompress.ir.ops import bind

aten = torch.ops.aten


def settle(exported: ExportedProgram) -> None:
    """Rewrites, in place, what torch.onnx has no or a wrong translation for, or an engine cannot read as translated."""
    _settle_attention(exported)
    for target in (aten.split.Tensor, aten.chunk.default):
        for node in exported.graph.find_nodes(op="call_function", target=target):
            _settle_split(node)
    join_circular_pads(exported.graph)
    if any(is_call(node, "dequantize") for node in exported.graph.nodes):
        for dims, target in enumerate((aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default), 1):
            for node in exported.graph.find_nodes(op="call_function", target=target):
                _settle_average(node, dims)


def _settle_attention(exported: ExportedProgram) -> None:
    """Writes attention so that torch.onnx can take it.

    Its kernels lay out what they give differently, and torch.onnx meets one when it replaces ``reshape`` by ``view``,
    another when it runs the graph with that: a copy gives one layout. And it translates attention of four dims only:
    any other is written as its products.
    """
    graph = exported.graph
    for node in graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
        with graph.inserting_after(node):
            if node.meta["val"].dim() == 4:
                result = graph.call_function(aten.clone.default, (node,), {"memory_format": torch.contiguous_format})
            else:
                result = graph.call_function(operator.getitem, (node, 0))
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result, delete_user_cb=lambda user, result=result: user is not result)
        if result.target is operator.getitem:
            node.target = aten._scaled_dot_product_attention_math.default
            node.meta = {key: value for key, value in node.meta.items() if key != "val"}


def _settle_split(node: fx.Node) -> None:
    """Writes pieces of a dim that is dynamic as slices: ONNX has no split into pieces of a size that is not known."""
    arguments: Any = bind(node.target, node.args, node.kwargs)  # type: ignore[arg-type]
    source, size, dim = arguments.values()
    if isinstance(source.meta["val"].shape[dim], int):
        return
    graph = node.graph
    with graph.inserting_before(node):
        if node.target is aten.chunk.default:  # so many pieces, the last of which may be smaller
            rows = valued_call(graph, aten.sym_size.int, source, dim)
            size = valued_call(graph, operator.floordiv, valued_call(graph, operator.add, rows, size - 1), size)
        for user in list(node.users):
            index: Any = user.args[1]
            start, end = (valued_call(graph, operator.mul, size, place) for place in (index, index + 1))
            piece = graph.call_function(aten.slice.Tensor, (source, dim, start, end))
            piece.meta = dict(user.meta)
            user.replace_all_uses_with(piece)
            graph.erase_node(user)
    graph.erase_node(node)


def _settle_average(node: fx.Node, dims: int) -> None:
    """Keeps an average over windows that may reach beyond the end apart from a quantizer behind it.

    onnxruntime (1.31) would make one kernel of both, which divides by the size of a whole window there. A factor of 1
    for each channel is between them to it.
    """
    arguments = bind(node.target, node.args, node.kwargs)  # type: ignore[arg-type]
    if arguments["ceil_mode"]:
        graph, value = node.graph, node.meta["val"]
        with graph.inserting_after(node):
            ones = valued_call(graph, aten.new_ones.default, node, [value.shape[-1 - dims], *[1] * dims])
        with graph.inserting_after(ones):
            apart = valued_call(graph, aten.mul.Tensor, node, ones)
        node.replace_all_uses_with(apart, delete_user_cb=lambda user: user not in (ones, apart))
