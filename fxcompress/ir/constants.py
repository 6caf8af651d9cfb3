"""Constant folding: subgraphs that depend on no input and no trainable state become non-persistent buffers."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.fx.node import map_arg

from fxcompress.ir.ops import free_name, get_state, set_state
from fxcompress.ir.program import CONSTANTS

aten = torch.ops.aten

# An expanded constant takes memory that its source does not: the source is folded and the expansion stays.
_GROWS = frozenset({aten.expand.default, aten.repeat.default, aten.repeat_interleave.self_int})


def fold_constants(graph_module: fx.GraphModule) -> int:
    """Folds constants in place; gives the number of constants that were made.

    Parameters and persistent buffers are not constants: a user may train or load them. Operations that draw random
    numbers are left alone, and so is everything on the meta device, where there is no value to fold.
    """
    graph = graph_module.graph
    constant = _constant_nodes(graph_module)
    values: dict[fx.Node, Any] = {}
    frontier = [
        node
        for node in graph.nodes
        if node in constant
        and node.op == "call_function"
        and isinstance(node.meta.get("val"), torch.Tensor)
        and any(user not in constant for user in node.users)
    ]
    for node in frontier:
        value = _evaluate(graph_module, node, values)
        name = f"{CONSTANTS}.{free_name(graph_module, CONSTANTS, node.name)}"
        set_state(graph_module, name, value.clone(memory_format=torch.contiguous_format), persistent=False)
        with graph.inserting_before(node):
            read = graph.get_attr(name)
        read.meta = dict(node.meta)
        node.replace_all_uses_with(read, delete_user_cb=lambda user: user not in constant)
    if frontier:
        _sweep(graph, constant)
    return len(frontier)


def is_constant_state(graph_module: fx.GraphModule, name: str) -> bool:
    """Whether a name is a non-persistent buffer: state that is neither trained nor saved."""
    path, _, leaf = name.rpartition(".")
    owner = graph_module.get_submodule(path)
    return leaf in owner._buffers and leaf in owner._non_persistent_buffers_set


def _constant_nodes(graph_module: fx.GraphModule) -> set[fx.Node]:
    constant: set[fx.Node] = set()
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            if (
                is_constant_state(graph_module, str(node.target))
                and not get_state(graph_module, str(node.target)).is_meta
            ):
                constant.add(node)
        elif (
            node.op == "call_function"
            and all(operand in constant for operand in node.all_input_nodes)
            and _foldable(node)
        ):
            constant.add(node)
    return constant


def _foldable(node: fx.Node) -> bool:
    target = node.target
    if isinstance(target, OpOverload):
        val = node.meta.get("val")
        if torch.Tag.nondeterministic_seeded in target.tags or target._schema.is_mutable or target in _GROWS:
            return False
        if isinstance(val, torch.Tensor) and (val.is_meta or val.device.type == "meta"):
            return False
        return target.namespace == "aten"
    return getattr(target, "__module__", "") in ("_operator", "math")


def _evaluate(graph_module: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """The value of a constant node; subgraphs are deep, so a stack takes the place of recursion."""
    pending = [node]
    with torch.no_grad():
        while pending:
            current = pending[-1]
            if current in values:
                pending.pop()
                continue
            missing = [operand for operand in current.all_input_nodes if operand not in values]
            if missing:
                pending += missing
                continue
            if current.op == "get_attr":
                values[current] = get_state(graph_module, str(current.target))
            else:
                args, kwargs = map_arg((current.args, current.kwargs), values.__getitem__)
                values[current] = current.target(*args, **kwargs)  # type: ignore[operator]
            pending.pop()
    return values[node]


def _sweep(graph: fx.Graph, constant: set[fx.Node]) -> None:
    for node in reversed([node for node in graph.nodes if node in constant]):
        if not node.users:
            graph.erase_node(node)
