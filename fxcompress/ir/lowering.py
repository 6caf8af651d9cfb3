"""Lowering: a called module as the ATen call that it makes, for passes that compute a layer's weight in the graph."""

from __future__ import annotations

from torch import fx, nn

from fxcompress.ir.fake import resized
from fxcompress.ir.ops import Operation, argument_names, get_state, set_module


def lowered(graph_module: fx.GraphModule, call: Operation) -> fx.Node:
    """The call of a module as a ``call_function`` in its place, whose parameters are read by ``get_attr`` nodes.

    The node and the parameters keep their names; the module becomes a container when no node calls it any more. A call
    that is a ``call_function`` already is given back as it is.
    """
    if call.module is None:
        return call.node
    graph, path = graph_module.graph, str(call.node.target)
    with graph.inserting_before(call.node):
        state = {name: _read(graph_module, held, call.node) for name, held in call.state.items()}
        given = {**call.arguments, **state}
        made = graph.call_function(call.overload, tuple(given[name] for name in argument_names(call.overload)))
    made.meta = dict(call.node.meta)
    call.node.replace_all_uses_with(made)
    graph.erase_node(call.node)
    made.name = call.node.name
    if all(node.op != "call_module" or str(node.target) != path for node in graph.nodes):
        container = nn.Module().eval()
        container._parameters, container._buffers = dict(call.module._parameters), dict(call.module._buffers)
        set_module(graph_module, path, container)
    return made


def read_state(graph_module: fx.GraphModule, name: str, reader: fx.Node) -> fx.Node:
    """A node before ``reader`` that reads a parameter or buffer."""
    with graph_module.graph.inserting_before(reader):
        return _read(graph_module, name, reader)


def _read(graph_module: fx.GraphModule, name: str, like: fx.Node) -> fx.Node:
    tensor = get_state(graph_module, name)
    read = graph_module.graph.get_attr(name)
    read.meta["val"] = resized(like.meta["val"], tensor.shape).to(tensor.dtype)
    return read
