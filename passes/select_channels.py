"""Chooses what to remove: the least important units of each channel group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from fxcompress.passes.channels.criteria import Evidence, criterion_of
from fxcompress.passes.channels.groups import ChannelReport
from fxcompress.passes.channels.plan import ChannelPlan, Removal, digest

from fxcompress.errors import InputError
from fxcompress.ir.program import Program
from fxcompress.pass_base import Analysis
from fxcompress.task import Task


@dataclass(frozen=True)
class SelectChannels(Analysis[ChannelPlan]):
    """Plans which channels, heads and groups to remove.

    Attributes:
        ratio: Share of each group's units to remove, from 0 to below 1.
        criterion: How importance is measured.
        batches: How many of the task's batches a criterion that needs data looks at.
        seed: Seed of criterion=random and of the order of batches.
    """

    name: ClassVar[str] = "select-channels"
    requires: ClassVar[tuple[str, ...]] = ("channels",)

    ratio: float = 0.5
    criterion: str = "l2"
    batches: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        criterion_of(self.criterion)
        if not 0 <= self.ratio < 1:
            raise InputError(f"ratio must be at least 0 and below 1, not {self.ratio}")

    def run(self, program: Program, task: Task | None) -> ChannelPlan:
        report: ChannelReport = program.analyze("channels")
        scores = criterion_of(self.criterion).measure(Evidence(program, report, task, self.batches, self.seed))
        removals = []
        for index, group in enumerate(report.groups):
            count = min(int(self.ratio * len(group)), len(group) - 1)
            if count > 0:
                order = np.argsort(scores[group.units], kind="stable")
                gone = tuple(sorted(order[:count].tolist()))
                members = tuple(map(str, group.members))
                removals.append(Removal(index, group.name, group.factor, len(group), gone, members, self.criterion))
        return ChannelPlan(digest(program), tuple(removals))
