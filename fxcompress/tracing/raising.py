"""Raising: ATen calls of standard layers become fresh ``torch.nn`` modules at their original names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._ops import OpOverload

from fxcompress.ir.layers import BY_OVERLOAD, Layer
from fxcompress.ir.ops import bind, get_state, set_module, set_state

Aliases = dict[str, list[str]]
"""First name of a parameter or buffer -> every name it has in the model."""


@dataclass(frozen=True)
class Origin:
    """What an exported graph does not say about the model it came from.

    Attributes:
        state: All state by name; ``num_batches_tracked`` is in no graph.
        paths: Names of all modules.
        cumulative: Batch norms with ``momentum=None``, which an exported graph shows as 0.
    """

    state: Mapping[str, torch.Tensor] = field(default_factory=dict)
    paths: frozenset[str] = frozenset()
    cumulative: frozenset[str] = frozenset()

    @classmethod
    def of(cls, model: nn.Module) -> Origin:
        modules = dict(model.named_modules(remove_duplicate=False))
        return cls(
            dict(model.state_dict(keep_vars=True)),
            frozenset(modules),
            frozenset(path for path, module in modules.items() if getattr(module, "momentum", 0.0) is None),
        )


def raise_layers(graph_module: fx.GraphModule, aliases: Aliases, origin: Origin) -> None:
    """Raises every ATen call whose parameters are exactly the state of one module.

    Args:
        graph_module: A normalised graph; rewritten in place.
        aliases: The names that share a tensor.
        origin: What the exported graph does not say about the captured model.
    """
    owned = _state_by_owner(aliases)
    made: dict[str, tuple[dict[str, Any], nn.Module]] = {}
    taken = set(origin.paths)
    for node in list(graph_module.graph.nodes):
        if node.op == "call_function" and isinstance(node.target, OpOverload) and node.target in BY_OVERLOAD:
            _raise_node(graph_module, node, aliases, owned, made, taken, origin)
    for node in reversed(list(graph_module.graph.nodes)):
        if node.op == "get_attr" and not node.users:
            graph_module.graph.erase_node(node)


def _state_by_owner(aliases: Aliases) -> dict[str, set[str]]:
    """Module path -> names of all state at or below it."""
    owned: dict[str, set[str]] = defaultdict(set)
    for names in aliases.values():
        for name in names:
            path = name.rpartition(".")[0]
            while True:
                owned[path].add(name)
                if not path:
                    break
                path = path.rpartition(".")[0]
    return owned


def _raise_node(
    graph_module: fx.GraphModule,
    node: fx.Node,
    aliases: Aliases,
    owned: dict[str, set[str]],
    made: dict[str, tuple[dict[str, Any], nn.Module]],
    taken: set[str],
    origin: Origin,
) -> None:
    call = bind(node.target, node.args, node.kwargs)  # type: ignore[arg-type]
    tensors = _tensor_view(graph_module, call)
    layer = _matching(node, call, tensors)
    if layer is None:
        return
    path = _owner(node, layer, call, aliases, owned) if layer.state else _stateless_path(node, taken)
    if path is None:
        return
    signature = {name: value for name, value in call.items() if not isinstance(value, fx.Node)}
    if path in made and (made[path][0] != signature or type(made[path][1]) is not layer.module):
        return  # the same weights with other attributes: the call keeps its ATen form
    if path not in made:
        module = _build(graph_module, layer, call, tensors, path, aliases, origin)
        set_module(graph_module, path, module)
        made[path] = (signature, module)
    operand = next(value for name, value in call.items() if isinstance(value, fx.Node) and name not in layer.state)
    with graph_module.graph.inserting_before(node):
        raised = graph_module.graph.create_node("call_module", path, (operand,), name=_node_name(path))
    raised.meta = dict(node.meta)
    node.replace_all_uses_with(raised)
    graph_module.graph.erase_node(node)


def _node_name(path: str) -> str:
    return path.replace(".", "_")


def _tensor_view(graph_module: fx.GraphModule, call: dict[str, Any]) -> dict[str, Any]:
    """The call with every node replaced by the (fake) tensor it stands for."""
    return {name: value.meta["val"] if isinstance(value, fx.Node) else value for name, value in call.items()}


def _matching(node: fx.Node, call: dict[str, Any], tensors: dict[str, Any]) -> Layer | None:
    for layer in BY_OVERLOAD[node.target]:  # type: ignore[index]
        reads = [call[name] for name in layer.state if call[name] is not None]
        if not all(isinstance(read, fx.Node) and read.op == "get_attr" for read in reads):
            continue
        literal = all(
            not isinstance(value, fx.Node) or name in layer.state or isinstance(value.meta.get("val"), torch.Tensor)
            for name, value in call.items()
        ) and not any(_holds_node(value) for value in call.values())
        if literal and layer.accepts(tensors):
            return layer
    return None


def _holds_node(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and any(isinstance(item, fx.Node) for item in value)


def _owner(
    node: fx.Node, layer: Layer, call: dict[str, Any], aliases: Aliases, owned: dict[str, set[str]]
) -> str | None:
    """The path whose state is exactly what the call reads, preferring the module the call was made in."""
    reads = {name: str(call[argument].target) for argument, name in layer.state.items() if call[argument] is not None}
    if not reads:
        return None
    first_leaf, first = next(iter(reads.items()))
    candidates = []
    for name in aliases.get(first, ()):
        path, _, leaf = name.rpartition(".")
        if leaf != first_leaf or not path:
            continue
        wanted = {f"{path}.{leaf}" for leaf in reads}
        extra = {f"{path}.{leaf}" for leaf in layer.extra_state}
        same = all(f"{path}.{leaf}" in aliases.get(target, ()) for leaf, target in reads.items())
        if same and wanted <= owned[path] <= wanted | extra:
            candidates.append(path)
    called = called_path(node)
    return called if called in candidates else next(iter(candidates), None)


def called_path(node: fx.Node) -> str:
    """Qualified name of the innermost module a node was traced in."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return str(path).split("@", 1)[0]


def _stateless_path(node: fx.Node, taken: set[str]) -> str:
    """A path for a layer without state (dropout): its own module's, or a fresh one beside the code that called it."""
    path = called_path(node)
    kind = str(node.meta["nn_module_stack"][next(reversed(node.meta["nn_module_stack"]))][1]) if path else ""
    if path and "dropout" in kind.rpartition(".")[2].lower():
        return path
    stem = f"{path}.dropout" if path else "dropout"
    name, count = stem, 0
    while name in taken:
        count += 1
        name = f"{stem}_{count}"
    taken.add(name)
    return name


def _build(
    graph_module: fx.GraphModule,
    layer: Layer,
    call: dict[str, Any],
    tensors: dict[str, Any],
    path: str,
    aliases: Aliases,
    origin: Origin,
) -> nn.Module:
    module = layer.build({k: [int(i) for i in v] if isinstance(v, (list, tuple)) else v for k, v in tensors.items()})
    module.eval()
    for argument, leaf in layer.state.items():
        if call[argument] is not None:
            set_state(module, leaf, get_state(graph_module, str(call[argument].target)))
    _restore_extra_state(module, layer, path, origin)
    return module


def _restore_extra_state(module: nn.Module, layer: Layer, path: str, origin: Origin) -> None:
    """State that the ATen call does not mention, from the model that was captured."""
    for leaf in layer.extra_state:
        if getattr(module, leaf, None) is not None:
            device = next((tensor.device for tensor in module.buffers() if not tensor.is_meta), torch.device("cpu"))
            fresh = torch.tensor(0, dtype=torch.long, device=device)
            set_state(module, leaf, origin.state.get(f"{path}.{leaf}", fresh))
    if path in origin.cumulative:
        setattr(module, "momentum", None)  # noqa: B010, typed as a float in torch
