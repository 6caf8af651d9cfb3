"""A quantized model as engines get it, with its weights as integers; and as it was, with nothing quantized."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from fxcompress.ir.dead_code import drop_unread_state, eliminate_dead
from fxcompress.ir.ops import free_name, get_state, set_state
from fxcompress.ir.program import clone_graph_module, copy_graph

QUANTIZED = "quantized_decomposed"
"""Namespace of the operators that quantize and dequantize."""


def is_quantized(module: fx.GraphModule) -> bool:
    """Whether a graph quantizes anything."""
    return any(getattr(node.target, "namespace", None) == QUANTIZED for node in module.graph.nodes)


def with_integer_weights(module: fx.GraphModule) -> fx.GraphModule:
    """The module with each weight that is quantized held as integers; other tensors are shared with ``module``."""
    rounded = list(_quantized_state(module))
    if not rounded:
        return module
    made = clone_graph_module(module, copy_graph(module.graph), lambda tensor: tensor)
    twins = {node.name: node for node in made.graph.nodes}
    names: dict[tuple[object, ...], str] = {}
    for node in rounded:
        key = (node.target, *(id(get_state(made, str(x.target))) if isinstance(x, fx.Node) else x for x in node.args))
        if key not in names:
            names[key] = _hold(made, node)
        twin = twins[node.name]
        with made.graph.inserting_before(twin):
            twin.replace_all_uses_with(made.graph.get_attr(names[key]))
    eliminate_dead(made.graph)
    drop_unread_state(made)
    made.recompile()
    made.meta.update(module.meta)
    return made


def without_quantization(module: fx.GraphModule) -> fx.GraphModule:
    """The module with nothing rounded to a grid: what is quantized and dequantized is read as it was."""
    made = clone_graph_module(module, copy_graph(module.graph), lambda tensor: tensor)
    for node in made.graph.nodes:
        source = node.args[0] if is_call(node, "dequantize") else None
        if isinstance(source, fx.Node) and is_call(source, "quantize"):
            node.replace_all_uses_with(source.args[0])
    eliminate_dead(made.graph)
    made.recompile()
    return made


def _quantized_state(module: fx.GraphModule) -> Iterator[fx.Node]:
    for node in module.graph.nodes:
        if is_call(node, "quantize") and holds_state(node):
            yield node


def holds_state(node: fx.Node) -> bool:
    """Whether a node reads the model's state and nothing else."""
    return all(operand.op == "get_attr" for operand in node.all_input_nodes)


def is_call(node: fx.Node, operator: str) -> bool:
    """Whether a node calls an operator whose name starts so, such as ``quantize``."""
    return node.op == "call_function" and str(node.target).startswith(f"{QUANTIZED}.{operator}")


def _hold(made: fx.GraphModule, node: fx.Node) -> str:
    args = fx.node.map_arg(node.args, lambda operand: get_state(made, str(operand.target)).detach())
    with torch.no_grad():
        value = node.target(*args)  # type: ignore[operator]
    path, _, leaf = str(node.all_input_nodes[0].target).rpartition(".")
    name = f"{path}.{free_name(made, path, f'{leaf}_integers')}".lstrip(".")
    set_state(made, name, value)
    return name
