"""Dead code: nodes whose value nothing reads, state that no node reads, and containers that hold nothing."""

from __future__ import annotations

from torch import fx, nn

from fxcompress.ir.ops import state_read


def eliminate_dead(graph: fx.Graph) -> int:
    """Drops nodes whose value nothing reads; gives how many."""
    dead = 0
    for node in reversed(list(graph.nodes)):
        if node.op in ("get_attr", "call_function", "call_module") and not node.users:
            graph.erase_node(node)
            dead += 1
    return dead


def drop_unread_state(graph_module: fx.GraphModule) -> list[str]:
    """Drops parameters and buffers that no node reads, and modules left empty; gives the names of the state dropped.

    A tensor that is read under one name keeps all its names.
    """
    read = {id(tensor) for node in graph_module.graph.nodes for tensor in state_read(graph_module, node).values()}
    dropped = []
    for path, module in list(graph_module.named_modules(remove_duplicate=False)):
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and id(tensor) not in read:
                dropped.append(f"{path}.{leaf}".lstrip("."))
                delattr(module, leaf)
    called = {str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"}
    _prune_containers(graph_module, called)
    return dropped


def _prune_containers(root: nn.Module, called: set[str], prefix: str = "") -> None:
    """Drops modules that hold nothing and are not called."""
    for name, child in list(root._modules.items()):
        if child is None:
            continue
        path = f"{prefix}{name}"
        _prune_containers(child, called, path + ".")
        if path not in called and not child._modules and not child._parameters and not child._buffers:
            del root._modules[name]
