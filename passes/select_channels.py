"""Chooses what to remove: the least important units of each channel group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from fxcompress.passes.channels.groups import ChannelReport
from fxcompress.passes.channels.importance import CRITERIA, importance
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
    """

    name: ClassVar[str] = "select-channels"
    requires: ClassVar[tuple[str, ...]] = ("channels",)

    ratio: float = 0.5
    criterion: str = "l2"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.ratio < 1:
            raise InputError(f"ratio must be at least 0 and below 1, not {self.ratio}")

    def run(self, program: Program, task: Task | None) -> ChannelPlan:
        report: ChannelReport = program.analyze("channels")
        score = CRITERIA[self.criterion](program, report, task)
        removals = []
        for index, group in enumerate(report.groups):
            count = min(int(self.ratio * len(group)), len(group) - 1)
            if count > 0:
                order = np.argsort(importance(program, report, group, score), kind="stable")
                gone = tuple(sorted(order[:count].tolist()))
                members = tuple(map(str, group.members))
                removals.append(Removal(index, group.name, group.factor, len(group), gone, members, self.criterion))
        return ChannelPlan(digest(program), tuple(removals))
