"""Emit: a Program as a plain ``torch.fx.GraphModule`` with the caller's signature."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from fxcompress.ir.program import Interface, Program, clone_graph_module

aten = torch.ops.aten

STRUCTURE = "structure"
"""Prefix of the submodules that pack and unpack structures Python has no literal for (dataclasses)."""

INTERFACE = "fxcompress_interface"
"""Key of an emitted module's ``meta`` that holds the :class:`Interface` it was emitted with."""


class Unpack(nn.Module):
    """Gives the leaves of one structured input."""

    def __init__(self, spec: TreeSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, value: Any) -> list[Any]:
        leaves, spec = tree_flatten(value)
        if spec.num_leaves != self.spec.num_leaves:
            raise TypeError(f"expected an input of structure {self.spec}, got {spec}")
        return leaves


class Fixed(nn.Module):
    """Checks an input that is no tensor: the graph was captured for one value of it."""

    def __init__(self, name: str, value: Any) -> None:
        super().__init__()
        self.name = name
        self.value = value

    def forward(self, value: Any) -> None:
        if isinstance(value, torch.Tensor) or value != self.value:
            raise ValueError(
                f"input {self.name!r} was {self.value!r} when the model was traced and is fixed; "
                f"to call it with {type(value).__name__} {value!r}, trace the model with that value"
            )


class StateTracer(fx.Tracer):
    """Traces an unpickled ``GraphModule`` again, as torch does, without computing on its buffers meanwhile."""

    proxy_buffer_attributes = True


class Pack(nn.Module):
    """Builds the output structure from its leaves."""

    def __init__(self, spec: TreeSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, *leaves: Any) -> Any:
        return tree_unflatten(list(leaves), self.spec)


def output_leaves(module: fx.GraphModule) -> list[Any]:
    """What an emitted module gives, leaf by leaf: nodes, and what is no tensor."""

    def leaves(tree: Any) -> Iterator[Any]:
        for leaf in tree_leaves(tree):
            packs = isinstance(leaf, fx.Node) and leaf.op == "call_module"
            if packs and isinstance(module.get_submodule(str(leaf.target)), Pack):
                yield from leaves(leaf.args)
            else:
                yield leaf

    return list(leaves(module.graph.output_node().args))


def emit(program: Program) -> fx.GraphModule:
    """A trainable module with the caller's signature and weights of its own, in eval mode.

    It needs none of the user's classes (but those of a dataclass output), and can be trained, deep-copied, pickled,
    exported and compiled.
    """
    return with_signature(program, copy.deepcopy)


def with_signature(program: Program, take: Callable[[torch.Tensor], torch.Tensor]) -> fx.GraphModule:
    """The module that :func:`emit` gives, with the tensors that ``take`` gives for the Program's.

    How it is called, with example inputs, stays in ``meta[INTERFACE]`` (deep copies keep it, pickles do not).
    """
    source = program.graph_module
    graph = fx.Graph(tracer_cls=StateTracer)
    structures: dict[str, nn.Module] = {}
    values = _placeholders(graph, program, structures)
    for node in source.graph.nodes:
        if node.op not in ("placeholder", "output"):
            values[node] = graph.node_copy(node, lambda operand: values[operand])
            values[node].meta = {key: node.meta[key] for key in ("stack_trace",) if key in node.meta}
            if node.target is aten.full.default and not all(isinstance(size, int) for size in node.args[0]):
                _size_from_tensor(node, values)
    leaves: Any = fx.node.map_arg(source.graph.output_node().args[0], lambda node: values[node])
    graph.output(_output(graph, program.interface.out_spec, list(leaves), structures))
    emitted = clone_graph_module(source, graph, take, {name: module.eval() for name, module in structures.items()})
    emitted.meta[INTERFACE] = program.interface
    return emitted


def _size_from_tensor(node: fx.Node, values: dict[fx.Node, fx.Node]) -> None:
    """Makes a tensor of dynamic size from the tensor that its size is read from.

    Pickling a ``GraphModule``, as other tools do, traces its code again, which sees only calls that are given a tensor.
    """
    source = node
    while not isinstance(source.meta["val"], torch.Tensor) or source is node:
        source = source.all_input_nodes[0]
    made = values[node]
    made.target = aten.new_full.default
    made.args = (values[source], *made.args)
    made.kwargs = {"dtype": node.meta["val"].dtype, "device": node.meta["val"].device}


def _placeholders(graph: fx.Graph, program: Program, structures: dict[str, nn.Module]) -> dict[fx.Node, fx.Node]:
    """One placeholder for each of the caller's inputs; structured inputs are taken apart."""
    interface = program.interface
    flat = [node for node in program.nodes if node.op == "placeholder"]
    specs, leaves = _top_level_specs(interface), interface.leaves
    values: dict[fx.Node, fx.Node] = {}
    position = 0
    top: list[tuple[fx.Node, TreeSpec, int]] = []
    for name, spec in zip(interface.names, specs, strict=True):
        top.append((graph.placeholder(name), spec, position))
        position += spec.num_leaves
    _set_defaults(top, leaves)
    for node, spec, start in top:
        for index, value in enumerate(_take_apart(graph, node, spec, structures), start):
            values[flat[index]] = value
            if not isinstance(leaves[index], torch.Tensor):
                checked = f"{STRUCTURE}_{len(structures)}"
                structures[checked] = Fixed(str(node.target), leaves[index])
                graph.call_module(checked, (value,))
    return values


def _set_defaults(top: list[tuple[fx.Node, TreeSpec, int]], leaves: list[Any]) -> None:
    """Inputs that are no tensors may be left out, if no input that must be given comes after them."""
    for node, spec, start in reversed(top):
        if not spec.is_leaf() or isinstance(leaves[start], torch.Tensor):
            return
        node.args = (leaves[start],)


def _top_level_specs(interface: Interface) -> list[TreeSpec]:
    args, kwargs = _children(interface.in_spec)
    return [*_children(args), *_children(kwargs)]


def _children(spec: TreeSpec) -> list[TreeSpec]:
    return list(spec.children()) if callable(getattr(spec, "children", None)) else list(spec.children_specs)


def _take_apart(graph: fx.Graph, node: fx.Node, spec: TreeSpec, structures: dict[str, nn.Module]) -> list[fx.Node]:
    if spec.is_leaf():
        return [node]
    if spec.type in (tuple, list, dict):
        keys = spec.context if spec.type is dict else range(len(_children(spec)))
        parts = []
        for key, child in zip(keys, _children(spec), strict=True):
            parts += _take_apart(graph, graph.call_function(operator.getitem, (node, key)), child, structures)
        return parts
    name = f"{STRUCTURE}_{len(structures)}"
    structures[name] = Unpack(spec)
    leaves = graph.call_module(name, (node,))
    return [graph.call_function(operator.getitem, (leaves, index)) for index in range(spec.num_leaves)]


def _output(graph: fx.Graph, spec: TreeSpec, leaves: list[Any], structures: dict[str, nn.Module]) -> Any:
    if spec.is_leaf():
        return leaves[0]
    if spec.type not in (tuple, list, dict):
        name = f"{STRUCTURE}_{len(structures)}"
        structures[name] = Pack(spec)
        return graph.call_module(name, tuple(leaves))
    parts = []
    position = 0
    for child in _children(spec):
        parts.append(_output(graph, child, leaves[position : position + child.num_leaves], structures))
        position += child.num_leaves
    if spec.type is dict:
        return dict(zip(spec.context, parts, strict=True))
    return spec.type(parts)
