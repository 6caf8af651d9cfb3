"""Calibration batches on their way through a Program as it was and as it will be, one node at a time.

All batches pass a node before any passes the next, so what is fitted at a node sees what it will get: values of layers
that are fitted already. Only values that a later node reads are held, and those that do not differ are held once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from fxcompress.ir.program import Program
from fxcompress.tracing.untouched import seeded
from fxcompress.verification.oracle import Kept, Oracle


class Streams:
    """The values of all batches in both Programs.

    Args:
        program: The Program, which may get new weights while the batches run.
        kept: What will be kept of each node's value; the rest is masked.
        batches: Flat inputs of each batch.
    """

    def __init__(self, program: Program, kept: Kept, batches: Sequence[list[Any]]) -> None:
        original = program.copy().graph_module
        self._kept = kept
        self._twins = dict(zip(program.nodes, original.graph.nodes, strict=True))
        self._runs = [(fx.Interpreter(original), Oracle(program, kept)) for _ in batches]
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
                for before, _ in self._runs:
                    before.env[twin] = before.run_node(twin)
            yield node
            with torch.no_grad(), seeded():
                self._run_after(node, twin)
            self._forget(node, twin)

    def changed(self, node: fx.Node) -> bool:
        """Whether the value of a node that has run differs between the Programs."""
        return node in self._changed

    def pairs(self, source: fx.Node, node: fx.Node) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """For each batch, the value of ``source`` after, and that of ``node`` before."""
        for before, after in self._runs:
            yield after.env[source], before.env[self._twins[node]]

    def keeps(self, node: fx.Node, value: torch.Tensor) -> dict[int, torch.Tensor]:
        """Dim -> which of its elements are kept, for the dims of a node's value of which some are not."""
        return self._runs[0][1].keeps(node, value)

    def _run_after(self, node: fx.Node, twin: fx.Node) -> None:
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                self._read_again(source)
        if node.name in self._kept or any(map(self.changed, node.all_input_nodes)):
            self._changed.add(node)
        for before, after in self._runs:
            after.env[node] = after.run_node(node) if node in self._changed else before.env[twin]

    def _read_again(self, source: fx.Node) -> None:
        """State may have been replaced since it was read."""
        before, after = self._runs[0]
        if after.fetch_attr(str(source.target)) is not before.fetch_attr(str(source.target)):
            self._changed.add(source)
            for _, after in self._runs:
                after.env[source] = after.run_node(source)

    def _forget(self, node: fx.Node, twin: fx.Node) -> None:
        for before, after in self._runs:
            for gone in before.user_to_last_uses.get(twin, ()):
                del before.env[gone]
            for gone in after.user_to_last_uses.get(node, ()):
                del after.env[gone]
