"""The registry of importance criteria. One of your own takes a few lines:

from fxcompress.passes.channels.criteria import Evidence, criterion
from fxcompress.passes.channels.criteria.totals import Scores, by_weight

@criterion("cubes")
def cubes(evidence: Evidence) -> Scores:
    return by_weight(evidence, lambda weight: weight.abs() ** 3)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from fxcompress.passes.channels.criteria.totals import Scores
from fxcompress.passes.channels.groups import ChannelReport

from fxcompress.errors import InputError, did_you_mean
from fxcompress.ir.program import Program
from fxcompress.task import Task


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a criterion may look at.

    Attributes:
        program: The Program, which stays as it is.
        report: Its channel dependencies.
        task: Data and loss, if the user gave them.
        batches: How many batches to look at.
        seed: Seed of what is drawn at random.
    """

    program: Program
    report: ChannelReport
    task: Task | None = None
    batches: int = 16
    seed: int = 0


Measure = Callable[[Evidence], Scores]
Scale = Literal["group", "model", "loss"]


@dataclass(frozen=True)
class Criterion:
    """A way to score units.

    Attributes:
        name: Its name in the registry.
        measure: Gives the score of each unit, NaN where the criterion says nothing; more is more important.
        scale: What scores of different groups have in common: ``loss`` where they estimate a change of the loss or the
            outputs, so that they also compare with what a unit costs; ``model`` where they compare as they are; else
            ``group``, and they are divided by their group's mean before groups are ranked together.
    """

    name: str
    measure: Measure
    scale: Scale


_CRITERIA: dict[str, Criterion] = {}


def criterion(name: str, *, scale: Scale = "group") -> Callable[[Measure], Measure]:
    """Registers a criterion.

    Args:
        name: Its name.
        scale: See :class:`Criterion`.

    Raises:
        InputError: The name is taken.
    """

    def register(measure: Measure) -> Measure:
        if name in _CRITERIA:
            raise InputError(f"the criterion {name!r} is defined twice: {_CRITERIA[name].measure.__qualname__}")
        _CRITERIA[name] = Criterion(name, measure, scale)
        return measure

    return register


def criterion_of(name: str) -> Criterion:
    """The criterion of that name.

    Raises:
        InputError: There is none; near names are given.
    """
    if name not in _CRITERIA:
        near = did_you_mean(name, _CRITERIA) or f"; criteria: {', '.join(names())}"
        raise InputError(f"there is no criterion {name!r}{near}")
    return _CRITERIA[name]


def names() -> list[str]:
    """The names of all criteria, sorted."""
    return sorted(_CRITERIA)
