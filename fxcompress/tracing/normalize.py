"""Canonical spelling of an exported graph: no asserts, no operations that do nothing, one name per meaning."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from fxcompress.ir.dead_code import eliminate_dead
from fxcompress.ir.ops import bind
from fxcompress.tracing.functionalize import same_shape, sizes

aten = torch.ops.aten

_INT_MAX = 2**62

ASSERTIONS = frozenset(
    getattr(aten, name)
    for name in (
        "_assert_async",
        "_assert_scalar",
        "_assert_tensor_metadata",
        "sym_constrain_range",
        "sym_constrain_range_for_size",
        "_functional_assert_async",
        "_print",
    )
    if hasattr(aten, name)
)
"""Operators that only check, and compute nothing."""

IDENTITIES = frozenset(
    {
        aten.alias.default,
        aten.contiguous.default,
        aten.clone.default,
        aten.lift_fresh.default,
        aten.lift.default,
        aten.lift_fresh_copy.default,
        aten.positive.default,
    }
)
"""Operators that copy or relabel memory: without in-place operations, the value is their operand's. Only complex views
need the order in memory that a copy may have made."""


def normalize(graph_module: fx.GraphModule) -> None:
    """Rewrites a functional graph into canonical spelling and drops dead code."""
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, OpOverload):
            continue
        if node.target.overloadpacket in ASSERTIONS:
            graph.erase_node(node)
            continue
        replacement = _replacement(graph, node)
        if replacement is not None and replacement is not node:
            node.replace_all_uses_with(replacement)
            graph.erase_node(node)
    _share_sizes(graph)
    eliminate_dead(graph)


def _share_sizes(graph: fx.Graph) -> None:
    """A size that an input has is read from that input, once."""
    known: dict[Any, tuple[fx.Node, int]] = {}
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for node in inputs:
        val = node.meta.get("val")
        shape: tuple[Any, ...] = tuple(val.shape) if isinstance(val, torch.Tensor) else ()
        for dim, size in enumerate(shape):
            if isinstance(size, torch.SymInt):
                known.setdefault(size.node.expr, (node, dim))
    reads: dict[Any, fx.Node] = {}
    for node in graph.find_nodes(op="call_function", target=aten.sym_size.int):
        size = node.meta["val"]
        expression = size.node.expr if isinstance(size, torch.SymInt) else None
        if expression not in known:
            continue
        if expression not in reads:
            with graph.inserting_after(next(reversed([*inputs, *reads.values()]))):
                reads[expression] = graph.call_function(aten.sym_size.int, known[expression])
            reads[expression].meta = dict(node.meta)
        node.replace_all_uses_with(reads[expression])


def _replacement(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    target = node.target
    assert isinstance(target, OpOverload)
    rule = _RULES.get(target)
    if target in IDENTITIES and not any(user.target is aten.view_as_complex.default for user in node.users):
        source = node.args[0]
        return source if isinstance(source, fx.Node) else None
    if rule is None:
        return None
    with graph.inserting_before(node):
        made = rule(graph, node, bind(target, node.args, node.kwargs))
    if made is not None and made is not node and not made.meta:
        made.meta = dict(node.meta)
    return made


Rule = Callable[[fx.Graph, fx.Node, dict[str, Any]], fx.Node | None]


def _as_reshape(graph: fx.Graph, node: fx.Node, call: dict[str, Any]) -> fx.Node | None:
    return graph.call_function(aten.reshape.default, (call["self"], call["size"]))


def _reshape_as(graph: fx.Graph, node: fx.Node, call: dict[str, Any]) -> fx.Node | None:
    return graph.call_function(aten.reshape.default, (call["self"], sizes(graph, node.args[1])))  # type: ignore[arg-type]


def _expand_as(graph: fx.Graph, node: fx.Node, call: dict[str, Any]) -> fx.Node | None:
    return graph.call_function(aten.expand.default, (call["self"], sizes(graph, node.args[1])))  # type: ignore[arg-type]


def _expand(graph: fx.Graph, node: fx.Node, call: dict[str, Any]) -> fx.Node | None:
    return call["self"] if same_shape(node.meta["val"], call["self"].meta["val"]) else None


def _slice(graph: fx.Graph, node: fx.Node, call: dict[str, Any]) -> fx.Node | None:
    start, end = call["start"], call["end"]
    whole = (start is None or start == 0) and (end is None or (isinstance(end, int) and end > _INT_MAX))
    if call["step"] == 1 and (whole or same_shape(node.meta["val"], call["self"].meta["val"])):
        return call["self"]  # type: ignore[no-any-return]
    return None


def _to(graph: fx.Graph, node: fx.Node, call: dict[str, Any]) -> fx.Node | None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    before, after = source.meta["val"], node.meta["val"]
    if before.device != after.device:
        return None
    if before.dtype == after.dtype:
        return source
    return graph.call_function(aten.to.dtype, (source, after.dtype))


def _pad(graph: fx.Graph, node: fx.Node, call: dict[str, Any]) -> fx.Node | None:
    return call["self"] if all(isinstance(amount, int) and amount == 0 for amount in call["pad"]) else None


def _dropout(graph: fx.Graph, node: fx.Node, call: dict[str, Any]) -> fx.Node | None:
    return call["input"] if call["p"] == 0.0 else None


def _filled(value: float | None) -> Rule:
    """A new tensor of one value is ``full``, of whatever tensor it takes the shape, dtype or device."""

    def rule(graph: fx.Graph, node: fx.Node, call: dict[str, Any]) -> fx.Node | None:
        val = node.meta["val"]
        size = call.get("size")
        if size is None:
            if any(isinstance(length, torch.SymInt) for length in val.shape):
                return None  # the shape of a tensor that is there says it best
            size = list(val.shape)
        fill = call["fill_value"] if value is None else value
        fill = bool(fill) if val.dtype is torch.bool and not isinstance(fill, fx.Node) else fill
        return graph.call_function(aten.full.default, (size, fill), {"dtype": val.dtype, "device": val.device})

    return rule


def _numel(graph: fx.Graph, node: fx.Node, call: dict[str, Any]) -> fx.Node | None:
    """The number of elements is the product of the sizes."""
    known = 1
    product: fx.Node | None = None
    for size, value in zip(sizes(graph, call["self"]), call["self"].meta["val"].shape, strict=True):
        if not isinstance(size, fx.Node):
            known *= size
        elif product is None:
            product = size
        else:
            total = product.meta["val"] * value
            product = graph.call_function(operator.mul, (product, size))
            product.meta["val"] = total
    if product is None or known == 1:
        return product
    made = graph.call_function(operator.mul, (product, known))
    made.meta["val"] = node.meta["val"]
    return made


def _slice_scatter(graph: fx.Graph, node: fx.Node, call: dict[str, Any]) -> fx.Node | None:
    """A write over everything leaves nothing of what was there."""
    start, end = call["start"], call["end"]
    whole = (start is None or start == 0) and (end is None or (isinstance(end, int) and end > _INT_MAX))
    same = call["src"].meta["val"].dtype == call["self"].meta["val"].dtype
    return call["src"] if whole and call["step"] == 1 and same else None


def _add_zero(graph: fx.Graph, node: fx.Node, call: dict[str, Any]) -> fx.Node | None:
    same = isinstance(call["other"], int) and call["other"] == 0
    return call["self"] if same else None


_RULES: dict[OpOverload, Rule] = {
    aten.view.default: _as_reshape,
    aten._unsafe_view.default: _as_reshape,
    aten.view_as.default: _reshape_as,
    aten.reshape_as.default: _reshape_as,
    aten.expand_as.default: _expand_as,
    aten.expand.default: _expand,
    aten.slice.Tensor: _slice,
    aten.to.dtype: _to,
    aten.to.device: _to,
    aten.to.dtype_layout: _to,
    aten.to.other: _to,
    aten._to_copy.default: _to,
    aten.type_as.default: _to,
    aten.pad.default: _pad,
    aten.dropout.default: _dropout,
    aten.feature_dropout.default: _dropout,
    aten.alpha_dropout.default: _dropout,
    aten.add.Tensor: _add_zero,
    aten.sym_numel.default: _numel,
    aten.slice_scatter.default: _slice_scatter,
    aten.zeros.default: _filled(0),
    aten.ones.default: _filled(1),
    aten.empty.memory_format: _filled(0),
    aten.new_zeros.default: _filled(0),
    aten.new_ones.default: _filled(1),
    aten.new_full.default: _filled(None),
    aten.new_empty.default: _filled(0),
    aten.zeros_like.default: _filled(0),
    aten.ones_like.default: _filled(1),
    aten.full_like.default: _filled(None),
    aten.empty_like.default: _filled(0),
}
