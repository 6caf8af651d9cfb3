"""The pass manager: runs a pipeline on copies of a Program and believes nothing a pass says about itself."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fxcompress.analysis import analyze, invalidate, resolve
from fxcompress.errors import InputError, VerificationError
from fxcompress.ir.program import Program
from fxcompress.manager.fingerprint import difference, fingerprint
from fxcompress.manager.instruments import Instrument, default_instruments
from fxcompress.manager.record import Record
from fxcompress.pass_base import Analysis, Pass, PassResult, Transform
from fxcompress.pipeline.text import Pipeline, as_pipeline
from fxcompress.task import Task, check_task

if TYPE_CHECKING:
    from fxcompress.report import Report


@dataclass(frozen=True, eq=False, repr=False)
class Result:
    """What a pipeline made.

    Attributes:
        before: The Program handed in, unchanged.
        program: The Program after the last pass.
        records: One record per pass, in order.
    """

    before: Program = field(repr=False)
    program: Program
    records: tuple[Record, ...]

    def __repr__(self) -> str:
        return f"Result({self.program!r} after {', '.join(map(str, self.records))})"

    @cached_property
    def report(self) -> Report:
        """Per-layer rows before and after, with what each pass did and refused."""
        from fxcompress.report import build_report

        return build_report(self.before, self.program, self.records)


class PassManager:
    """Runs the passes of a pipeline in order.

    Args:
        pipeline: Pipeline text, a pipeline, or passes.
        instruments: What watches each pass, in the order called; :func:`default_instruments` if not given.

    Raises:
        InputError: If the pipeline is wrong or a pass requires an analysis that does not exist.
    """

    def __init__(
        self, pipeline: str | Pipeline | Sequence[Pass], instruments: Sequence[Instrument] | None = None
    ) -> None:
        self.pipeline = as_pipeline(pipeline)
        self.instruments = tuple(default_instruments() if instruments is None else instruments)
        for item in self.pipeline:
            for name in item.requires:
                try:
                    resolve(name)
                except InputError as error:
                    error.add_note(f"required by the pass {item.name!r}")
                    raise

    def run(self, program: Program, task: Task | None = None) -> Result:
        """Runs the pipeline; ``program`` stays as it is, also when a pass fails or the run is interrupted.

        Raises:
            InputError: If ``program`` is not a Program or ``task`` not a Task.
            VerificationError: If a pass breaks the Program, or is wrong about what it did.
        """
        given: Any = program
        if not isinstance(given, Program):
            raise InputError(
                f"PassManager.run needs a Program, not {type(given).__name__}; make one with fxcompress.trace"
            )
        check_task(task)
        current = program.copy()
        for instrument in self.instruments:
            instrument.before_pipeline(current, self.pipeline, task)
        records: list[Record] = []
        for index, item in enumerate(self.pipeline, start=1):
            try:
                current, record = self._run_pass(current, item, index, task)
            except Exception as error:
                error.add_note(f"in pass {index} of {len(self.pipeline)}: {item}")
                raise
            records.append(record)
        for instrument in self.instruments:
            instrument.after_pipeline(current, tuple(records))
        return Result(program, current, tuple(records))

    def _run_pass(self, before: Program, item: Pass, index: int, task: Task | None) -> tuple[Program, Record]:
        for name in item.requires:
            analyze(before, name, task)
        for instrument in self.instruments:
            instrument.before_pass(before, item)
        started = time.perf_counter()
        if isinstance(item, Analysis):
            value = analyze(before, item, task)
            after, record = before, Record(index, item, time.perf_counter() - started, value=value)
        else:
            after, result = _transform(before, item, task)
            record = Record(index, item, time.perf_counter() - started, result=result)
        for instrument in self.instruments:
            record = instrument.after_pass(before, after, record)
        return after, record


def _transform(before: Program, item: Pass, task: Task | None) -> tuple[Program, PassResult]:
    """Runs a transform on a copy, and checks what it says of itself."""
    if not isinstance(item, Transform):
        raise InputError(f"{item.name!r} is neither an Analysis nor a Transform; derive it from one of them")
    after = before.copy()
    original = fingerprint(before)
    result = item.run(after, task)
    _check_shared(item, difference(original, fingerprint(before)))
    _check_changed(item, result, difference(original, fingerprint(after)))
    if result.changed:
        after.graph_module.recompile()
        invalidate(after, item.preserves)
    return after, result


def _check_shared(item: Transform, change: str | None) -> None:
    if change is not None:
        raise VerificationError(
            f"{item.name!r} wrote into what its copy of the Program shares with the Program before it ({change}); "
            "put new tensors in place instead"
        )


def _check_changed(item: Transform, result: Any, change: str | None) -> None:
    if not isinstance(result, PassResult):
        raise VerificationError(f"{item.name!r} returned {result!r}; a transform returns a PassResult")
    if change is not None and not result.changed:
        raise VerificationError(f"{item.name!r} says that it changed nothing, but {change}; return changed=True")
    if change is None and result.changed:
        raise VerificationError(f"{item.name!r} says that it changed the Program, but did not; return changed=False")
