"""Takes planned channels, heads and groups out of a model (structured pruning, as in arXiv:2301.12900)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from fxcompress.passes.channels.kept import kept_shapes
from fxcompress.passes.channels.plan import planned
from fxcompress.passes.channels.removal import remove

from fxcompress.ir.program import Program
from fxcompress.pass_base import Guarantee, PassResult, Transform
from fxcompress.task import Task
from fxcompress.verification.oracle import Kept


@dataclass(frozen=True)
class RemoveChannels(Transform):
    """Removes what the last ``select-channels`` chose, or what a plan in a file says.

    Parameters are sliced; sizes, groups, indices and scales that follow from them are rewritten. Whether the result is
    right is checked against the model before, with the removed elements masked.

    Attributes:
        plan: JSON file of a plan; none for that of the last select-channels.
    """

    name: ClassVar[str] = "remove-channels"
    requires: ClassVar[tuple[str, ...]] = ("channels",)
    guarantee: ClassVar[Guarantee] = "lossy"

    plan: str | None = None

    def run(self, program: Program, task: Task | None) -> PassResult:
        plan, report, mask = planned(program, self.plan, self.name)
        if not mask.any():
            return PassResult(changed=False, refusals=plan.refusals, statistics={"removed": 0})
        before = _parameters(program)
        remove(program, report, mask)
        share = 1 - _parameters(program) / before
        return PassResult(
            changed=True,
            refusals=plan.refusals,
            statistics={"removed": int(mask.sum()), "% of parameters": round(100 * share, 1)},
        )

    def kept(self, before: Program) -> Kept:
        _, report, mask = planned(before, self.plan, self.name)
        return kept_shapes(report, mask)


def _parameters(program: Program) -> int:
    tensors: dict[int, torch.Tensor] = {id(p): p for p in program.graph_module.parameters()}
    return sum(tensor.numel() for tensor in tensors.values())
