"""Canonical spelling of an exported graph: no asserts, no operations that do nothing, one name per meaning."""

from __future__ import annotations

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
"""Operators that copy or relabel memory: without in-place operations, the value is their operand's."""


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
    eliminate_dead(graph)


def _replacement(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    target = node.target
    assert isinstance(target, OpOverload)
    rule = _RULES.get(target)
    if target in IDENTITIES:
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
    """A tensor made in the shape of another is a constant when that shape is."""

    def rule(graph: fx.Graph, node: fx.Node, call: dict[str, Any]) -> fx.Node | None:
        val = node.meta["val"]
        if any(isinstance(size, torch.SymInt) for size in val.shape):
            return None
        fill = call["fill_value"] if value is None else value
        fill = bool(fill) if val.dtype is torch.bool and not isinstance(fill, fx.Node) else fill
        return graph.call_function(
            aten.full.default, (list(val.shape), fill), {"dtype": val.dtype, "device": val.device}
        )

    return rule


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
    aten.new_zeros.default: _filled(0),
    aten.new_ones.default: _filled(1),
    aten.new_full.default: _filled(None),
    aten.new_empty.default: _filled(0),
    aten.zeros_like.default: _filled(0),
    aten.ones_like.default: _filled(1),
    aten.full_like.default: _filled(None),
    aten.empty_like.default: _filled(0),
}
