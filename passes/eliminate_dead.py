"""Removes what nothing reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fxcompress.ir.dead_code import drop_unread_state, eliminate_dead
from fxcompress.ir.program import Program
from fxcompress.pass_base import Guarantee, PassResult, Transform
from fxcompress.task import Task


@dataclass(frozen=True)
class EliminateDead(Transform):
    """Removes nodes whose value nothing reads, and parameters and buffers that no node reads.

    Inputs stay, read or not: they are the model's signature.
    """

    name: ClassVar[str] = "eliminate-dead"
    guarantee: ClassVar[Guarantee] = "exact"

    def run(self, program: Program, task: Task | None) -> PassResult:
        """Counts ``nodes`` and ``state`` (parameters and buffers) removed."""
        nodes = eliminate_dead(program.graph)
        state = drop_unread_state(program.graph_module)
        return PassResult(bool(nodes or state), statistics={"nodes": nodes, "state": len(state)})
