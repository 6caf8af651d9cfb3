"""What reads what in an ONNX file."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any


def read_by(node: Any) -> Iterator[str]:
    """Names of all that an operation reads, also within its branches and bodies."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
            for inner in graph.node:
                yield from read_by(inner)


def needed_for(wanted: Collection[str], nodes: Sequence[Any]) -> tuple[list[Any], set[str]]:
    """The nodes that values are computed by, in execution order, and the names of all that is read or wanted."""
    names, kept = set(wanted), []
    for node in reversed(nodes):
        if not names.isdisjoint(node.output):
            names.update(read_by(node))
            kept.append(node)
    return kept[::-1], names


def replace_nodes(model: Any, nodes: Sequence[Any]) -> None:
    """Gives a model other nodes, without those that nobody reads, and takes away what is held for no other."""
    kept, names = needed_for([value.name for value in model.graph.output], nodes)
    del model.graph.node[:]
    model.graph.node.extend(kept)
    for held in (model.graph.initializer, model.graph.value_info):
        read = [part for part in held if part.name in names]
        del held[:]
        held.extend(read)
