"""Computes, once, what depends on no input and on no trainable state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fxcompress.ir.constants import fold_constants
from fxcompress.ir.dead_code import drop_unread_state
from fxcompress.ir.program import Program
from fxcompress.pass_base import Guarantee, PassResult, Transform
from fxcompress.task import Task


@dataclass(frozen=True)
class FoldConstants(Transform):
    """Replaces subgraphs that depend on no input and no trainable or saved state by constants.

    Parameters and persistent buffers are not constants: they are trained, loaded and saved. Random operations stay, and
    so do expansions, whose result takes memory that their source does not.
    """

    name: ClassVar[str] = "fold-constants"
    guarantee: ClassVar[Guarantee] = "exact"

    def run(self, program: Program, task: Task | None) -> PassResult:
        """Counts the operations ``folded``."""
        folded = fold_constants(program.graph_module)
        if folded:
            drop_unread_state(program.graph_module)
        return PassResult(bool(folded), statistics={"folded": folded})
