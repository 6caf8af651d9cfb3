"""Calibration batches on their way through a Program as it was and as it will be, one node at a time.

All batches pass a node before any passes the next, so what is fitted at a node sees what it will get: values of layers
that are fitted already. Only values that a later node reads are held, and those that do not differ, or come from the
model's state alone, are held once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from fxcompress.tracing.untouched import seeded


class Streams:
    """The values of all batches in both Programs.

    Args:
        before: Runs the Program as it was: a graph of its own, of the same nodes.
        after: Runs the Program as it will be, which may get new weights while the batches run.
        differs: Whether the two compute a node in different ways.
        batches: Flat inputs of each batch.
    """

    def __init__(
        self,
        before: Callable[[], fx.Interpreter],
        after: Callable[[], fx.Interpreter],
        differs: Callable[[fx.Node], bool],
        batches: Sequence[list[Any]],
    ) -> None:
        self._differs = differs
        self._runs = [(before(), after()) for _ in batches]
        nodes, twins = (_nodes(run) for run in reversed(self._runs[0]))
        self._twins = dict(zip(nodes, twins, strict=True))
        self._stored = _stored(self._twins)
        self._changed: set[fx.Node] = set()
        for pair, leaves in zip(self._runs, batches, strict=True):
            for run in pair:
                run.args_iter = iter(leaves)

    def __len__(self) -> int:
        return len(self._twins)

    def __iter__(self) -> Iterator[fx.Node]:
        """Each node of the Program, when all it reads is known and before its own value after is computed."""
        for node, twin in self._twins.items():
            with torch.no_grad(), seeded():
                for before, _ in self._runs[:1] if node in self._stored else self._runs:
                    before.env[twin] = before.run_node(twin)
                self._share(node, 0, twin)
            yield node
            with torch.no_grad(), seeded():
                self._refresh(node)
                self._run_after(node, twin)
            self._forget(node, twin)

    def changed(self, node: fx.Node) -> bool:
        """Whether the value of a node that has run differs between the Programs."""
        return node in self._changed

    def pairs(self, source: fx.Node, node: fx.Node) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """For each batch, the value of ``source`` after, and that of ``node`` before."""
        for before, after in self._runs:
            yield after.env[source], before.env[self._twins[node]]

    def outputs(self, node: fx.Node) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """For each batch, the value of the node at hand before, and what it would be after as things stand."""
        self._refresh(node)
        for before, after in self._runs:
            with torch.no_grad(), seeded():
                value = after.run_node(node)
            yield before.env[self._twins[node]], value

    def _share(self, node: fx.Node, which: int, key: fx.Node) -> None:
        """Gives all batches the one value of what comes from state alone."""
        if node in self._stored:
            for pair in self._runs[1:]:
                pair[which].env[key] = self._runs[0][which].env[key]

    def _refresh(self, node: fx.Node) -> None:
        """State may be new, or replaced since a node on the way from it was computed."""
        for source in node.all_input_nodes:
            is_new = source not in self._twins
            if is_new or (source in self._stored and self._replaced(source)):
                self._refresh(source)
                self._stored.add(source)
                self._changed.add(source)
                self._runs[0][1].env[source] = self._runs[0][1].run_node(source)
                self._share(source, 1, source)

    def _replaced(self, node: fx.Node) -> bool:
        before, after = self._runs[0]
        if node.op == "get_attr":
            return after.fetch_attr(str(node.target)) is not before.fetch_attr(str(node.target))
        return any(map(self._replaced, node.all_input_nodes))

    def _run_after(self, node: fx.Node, twin: fx.Node) -> None:
        if self._differs(node) or any(map(self.changed, node.all_input_nodes)):
            self._changed.add(node)
        runs = self._runs[:1] if node in self._stored else self._runs
        for before, after in runs:
            after.env[node] = after.run_node(node) if node in self._changed else before.env[twin]
        self._share(node, 1, node)

    def _forget(self, node: fx.Node, twin: fx.Node) -> None:
        for before, after in self._runs:
            for gone in before.user_to_last_uses.get(twin, ()):
                del before.env[gone]
            for gone in after.user_to_last_uses.get(node, ()):
                if gone not in self._stored:
                    del after.env[gone]


def _nodes(run: fx.Interpreter) -> list[fx.Node]:
    assert isinstance(run.module, fx.GraphModule)
    return list(run.module.graph.nodes)


def _stored(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes whose value comes from the model's state alone."""
    found: set[fx.Node] = set()
    for node in nodes:
        sources = node.all_input_nodes
        if node.op == "get_attr" or (node.op == "call_function" and sources and all(each in found for each in sources)):
            found.add(node)
    return found
