"""Importance criteria: how much a model would miss each unit.

A criterion gives a score for each element of a member (one index of one dim of one parameter); a unit's score is the
sum over the elements that carry it, divided by the number of its group's dims, so that groups compare.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from fxcompress.passes.channels.groups import ChannelGroup, ChannelReport, Member
from fxcompress.passes.channels.units import NONE

from fxcompress.errors import InputError
from fxcompress.ir.ops import get_state
from fxcompress.ir.program import Program
from fxcompress.task import Task

Scores = npt.NDArray[np.float64]
Score = Callable[[Member], Scores | None]
Criterion = Callable[[Program, ChannelReport, Task | None], Score]

CRITERIA: dict[str, Criterion] = {}
"""Name -> function that prepares a criterion and gives the score of a member's elements, ``None`` to leave it out."""


def criterion(name: str) -> Callable[[Criterion], Criterion]:
    """Registers a criterion.

    Raises:
        InputError: The name is taken.
    """

    def register(function: Criterion) -> Criterion:
        if name in CRITERIA:
            raise InputError(f"the criterion {name!r} is defined twice")
        CRITERIA[name] = function
        return function

    return register


def importance(program: Program, report: ChannelReport, group: ChannelGroup, score: Score) -> Scores:
    """A score for each unit of a group."""
    total = np.zeros(report.units.count)
    counted = 0
    for member in group.members:
        found = score(member)
        if found is None:
            continue
        counted += 1
        for factor in report.state[member.state][member.dim]:
            for column in report.resolved(factor).T:
                known = column != NONE
                np.add.at(total, column[known], found[known])
    found_: Scores = total[group.units] / max(counted, 1)
    return found_


def _by_element(program: Program, member: Member, each: Callable[[torch.Tensor], torch.Tensor]) -> Scores:
    tensor = get_state(program.graph_module, member.state).detach()
    rest = [dim for dim in range(tensor.dim()) if dim != member.dim]
    values = each(tensor.double())
    found: Scores = (values.sum(rest) if rest else values).numpy()
    return found


def _trainable(program: Program, member: Member) -> bool:
    return isinstance(get_state(program.graph_module, member.state), torch.nn.Parameter)


@criterion("l2")
def l2(program: Program, report: ChannelReport, task: Task | None) -> Score:
    """Sum of squared weights (Li et al. 2017, arXiv:1608.08710, with the square of the norm)."""
    return lambda member: _by_element(program, member, torch.square) if _trainable(program, member) else None


@criterion("l1")
def l1(program: Program, report: ChannelReport, task: Task | None) -> Score:
    """Sum of absolute weights (Li et al. 2017, arXiv:1608.08710)."""
    return lambda member: _by_element(program, member, torch.abs) if _trainable(program, member) else None
