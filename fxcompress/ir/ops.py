"""One view of an operation, whether it is written as a module call or as an ATen call.

``operation(graph_module, node)`` gives the ATen overload, its named arguments and where its parameters live. Passes
read this instead of telling ``call_module nn.Conv2d`` and ``call_function aten.conv2d`` apart themselves.
"""

from __future__ import annotations

import functools
import operator
from collections import defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._ops import OpOverload

from fxcompress.ir.layers import layer_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Operation:
    """An ATen call with named arguments.

    Attributes:
        node: The node in the graph.
        overload: The ATen (or custom) overload that it calls.
        arguments: Every argument of the schema by name, defaults filled in. A tensor operand is an ``fx.Node``; an
            argument held in ``state`` is the ``torch.Tensor`` itself.
        state: Argument name -> qualified name of the parameter or buffer it reads.
        module: The called module, or ``None`` for an ATen call.
    """

    node: fx.Node
    overload: OpOverload
    arguments: Mapping[str, Any]
    state: Mapping[str, str]
    module: nn.Module | None

    @property
    def operands(self) -> dict[str, fx.Node]:
        """Tensor arguments computed by other nodes (parameters left out)."""
        return {name: value for name, value in self.arguments.items() if isinstance(value, fx.Node)}

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def operand(self, name: str) -> Any:
        """Argument ``name`` of an ATen call as it stands there: a node also where it reads the model's state."""
        return bind(self.overload, self.node.args, self.node.kwargs)[name]

    def parameter(self, name: str) -> torch.Tensor | None:
        """The tensor that argument ``name`` reads straight from the model's state, or ``None``."""
        return self.arguments[name] if name in self.state else None


@functools.lru_cache(maxsize=4096)
def _defaults(overload: OpOverload) -> Mapping[str, Any]:
    """The arguments of a call in order, each with its default, ``None`` where it has none."""
    return {a.name: a.default_value if a.has_default_value() else None for a in overload._schema.arguments}


@functools.lru_cache(maxsize=4096)
def argument_names(overload: OpOverload) -> tuple[str, ...]:
    """The names of a call's arguments, in order."""
    return tuple(_defaults(overload))


def bind(overload: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call by schema name, with the schema's defaults filled in."""
    return {**_defaults(overload), **dict(zip(argument_names(overload), args, strict=False)), **kwargs}


def is_operation(target: Any) -> bool:
    """Whether a ``call_function`` target may stand in a Program: an operator overload, or arithmetic on sizes."""
    if isinstance(target, OpOverload) or target is operator.getitem:
        return True
    module = getattr(target, "__module__", None) or ""
    return module in ("_operator", "math", "builtins") or (
        module.startswith("torch") and getattr(target, "__name__", "").startswith("sym_")
    )


def get_module(root: nn.Module, path: str) -> nn.Module:
    """The module at a qualified name, in a tenth of the time that ``get_submodule`` takes."""
    module: Any = root
    try:
        for name in path.split(".") if path else ():
            module = module._modules[name]
    except KeyError:
        return root.get_submodule(path)  # raises what it is known to raise
    found: nn.Module = module
    return found


def get_state(root: nn.Module, name: str) -> torch.Tensor:
    """The parameter or buffer at a qualified name."""
    path, _, leaf = name.rpartition(".")
    value = getattr(get_module(root, path), leaf)
    if not isinstance(value, torch.Tensor):
        raise AttributeError(f"{name!r} is not a tensor")
    return value


def set_state(root: nn.Module, name: str, value: torch.Tensor, *, persistent: bool = True) -> None:
    """Puts a parameter or buffer at a qualified name, making empty containers on the way."""
    path, _, leaf = name.rpartition(".")
    owner = root
    for part in path.split(".") if path else ():
        if part not in owner._modules:
            owner.add_module(part, nn.Module().train(owner.training))
        owner = owner.get_submodule(part)
    if isinstance(value, nn.Parameter):
        owner._buffers.pop(leaf, None)
        owner.register_parameter(leaf, value)
    else:
        if leaf in owner._parameters:
            del owner._parameters[leaf]
        owner.register_buffer(leaf, value, persistent=persistent)


def free_name(root: nn.Module, path: str, leaf: str) -> str:
    """``leaf``, or ``leaf`` with a number, so that no state at ``path`` has that name yet."""
    try:
        owner = root.get_submodule(path)
    except AttributeError:
        return leaf
    name, count = leaf, 0
    while name in owner._buffers or name in owner._parameters or name in owner._modules:
        count += 1
        name = f"{leaf}_{count}"
    return name


def replace_state(root: nn.Module, old: torch.Tensor, new: torch.Tensor) -> None:
    """Puts ``new`` under every name that ``old`` has: what is tied stays tied."""
    replace_states(root, {id(old): new})


def replace_states(root: nn.Module, successors: Mapping[int, torch.Tensor]) -> None:
    """Puts new tensors in the places of old ones, given by ``id``: what is tied stays tied."""
    for module in root.modules():
        for table in (module._parameters, module._buffers):
            for leaf in [leaf for leaf, tensor in table.items() if id(tensor) in successors]:
                new = successors[id(table[leaf])]
                set_state(module, leaf, new, persistent=leaf not in module._non_persistent_buffers_set)


def state_read(graph_module: fx.GraphModule, node: fx.Node) -> dict[str, torch.Tensor]:
    """Parameters and buffers that a ``get_attr`` or ``call_module`` node reads, by qualified name."""
    if node.op == "get_attr":
        return {str(node.target): get_state(graph_module, str(node.target))}
    if node.op != "call_module":
        return {}
    module = get_module(graph_module, str(node.target))
    held = (*module._parameters.items(), *module._buffers.items())
    return {f"{node.target}.{leaf}": tensor for leaf, tensor in held if tensor is not None}


def readers(graph_module: fx.GraphModule) -> dict[int, list[fx.Node]]:
    """``id`` of a parameter or buffer -> the calls that read it, by whatever name; a module reads all it holds."""
    found: dict[int, list[fx.Node]] = defaultdict(list)
    for node in graph_module.graph.nodes:
        for tensor in state_read(graph_module, node).values():
            found[id(tensor)] += node.users if node.op == "get_attr" else [node]
    return found


def set_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Puts a module at a qualified name, keeping the children of what was there."""
    owner = root
    *parents, leaf = path.split(".")
    for part in parents:
        if part not in owner._modules:
            owner.add_module(part, nn.Module().train(owner.training))
        owner = owner.get_submodule(part)
    previous = owner._modules.get(leaf)
    for name, child in previous._modules.items() if previous is not None else ():
        if name not in module._modules:
            module.add_module(name, child)
    owner.add_module(leaf, module)


def overload_of(graph_module: fx.GraphModule, node: fx.Node) -> OpOverload | None:
    """The overload of the operation that a node performs, ``None`` where :func:`operation` gives none."""
    if node.op == "call_function" and isinstance(node.target, OpOverload):
        return node.target
    layer = layer_of(get_module(graph_module, str(node.target))) if node.op == "call_module" else None
    return None if layer is None else layer.overload


def operation(graph_module: fx.GraphModule, node: fx.Node) -> Operation | None:
    """The operation a node performs, or ``None`` for inputs, outputs, state reads and Python-level nodes."""
    if node.op == "call_function" and isinstance(node.target, OpOverload):
        arguments = bind(node.target, node.args, node.kwargs)
        state = {}
        for name, value in arguments.items():
            if isinstance(value, fx.Node) and value.op == "get_attr":
                state[name] = str(value.target)
                arguments[name] = get_state(graph_module, str(value.target))
        return Operation(node, node.target, arguments, state, None)
    if node.op != "call_module":
        return None
    module = get_module(graph_module, str(node.target))
    layer = layer_of(module)
    if layer is None:
        return None
    arguments = {**_defaults(layer.overload), **layer.arguments(module), _operand(layer.overload): node.args[0]}
    state = {}
    for argument, leaf in layer.state.items():
        tensor = module._parameters[leaf] if leaf in module._parameters else module._buffers[leaf]
        arguments[argument] = tensor
        if tensor is not None:
            state[argument] = f"{node.target}.{leaf}"
    return Operation(node, layer.overload, arguments, state, module)


def _operand(overload: OpOverload) -> str:
    """The argument that a layer's input is."""
    return "indices" if overload is aten.embedding.default else argument_names(overload)[0]


def operations(graph_module: fx.GraphModule, overloads: Container[OpOverload] | None = None) -> Iterator[Operation]:
    """Every operation of a graph in execution order, or those of some overloads."""
    for node in graph_module.graph.nodes:
        if overloads is None or overload_of(graph_module, node) in overloads:
            found = operation(graph_module, node)
            if found is not None:
                yield found
