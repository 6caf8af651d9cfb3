"""``bisect``: which pass of a pipeline breaks a check of the user's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fxcompress.errors import InputError
from fxcompress.ir.program import Program
from fxcompress.manager.instruments import Instrument
from fxcompress.manager.pass_manager import PassManager
from fxcompress.manager.record import Record
from fxcompress.pass_base import Pass
from fxcompress.pipeline.text import Pipeline
from fxcompress.task import Task


@dataclass(frozen=True, eq=False)
class BisectResult:
    """The pass that breaks a check.

    Attributes:
        index: Its position in the pipeline, from 1.
        item: The pass.
        before: The Program it got, which passes the check.
        after: The Program it made, which fails it.
    """

    index: int
    item: Pass
    before: Program
    after: Program

    def __str__(self) -> str:
        return f"pass {self.index}, {self.item}, is the first whose result fails the check"


def bisect(
    program: Program,
    pipeline: str | Pipeline | Sequence[Pass],
    check: Callable[[Program], bool],
    task: Task | None = None,
) -> BisectResult:
    """Finds the first pass whose result fails ``check``.

    The pipeline runs once, without verification; ``check`` is called about log2(passes) + 2 times. If it fails and
    passes again along the pipeline, one of the passes where it turns from true to false is found.

    Args:
        program: The input Program, which must pass the check.
        pipeline: The pipeline, whose result must fail it.
        check: True when a Program is good.
        task: Handed to the passes.

    Raises:
        InputError: If the input fails the check already, or the result passes it.
    """
    snapshots = _Snapshots()
    if not check(program):
        raise InputError("the Program fails the check before any pass; start from one that passes it")
    manager = PassManager(pipeline, [snapshots])
    manager.run(program, task)
    programs = [program, *snapshots.programs]
    good, bad = 0, len(manager.pipeline)
    if check(programs[bad]):
        raise InputError(f"the result of {str(manager.pipeline)!r} passes the check; there is nothing to find")
    while bad - good > 1:
        middle = (good + bad) // 2
        if check(programs[middle]):
            good = middle
        else:
            bad = middle
    return BisectResult(bad, manager.pipeline[good], programs[good], programs[bad])


class _Snapshots(Instrument):
    """Keeps the Program after each pass; they share every tensor that the pass did not replace."""

    def __init__(self) -> None:
        self.programs: list[Program] = []

    def after_pass(self, before: Program, after: Program, record: Record) -> Record:
        self.programs.append(after)
        return record
