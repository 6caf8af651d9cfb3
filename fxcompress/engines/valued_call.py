"""A call that a graph gets on its way to an engine, with the value that the engine's exporter reads off it."""

from __future__ import annotations

from typing import Any

from torch import fx


def valued_call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    """Inserts ``target(*args)`` where the graph inserts, and notes what it gives for its arguments' values."""
    made = graph.call_function(target, args)
    made.meta["val"] = target(*fx.node.map_arg(args, lambda node: node.meta["val"]))
    return made
