"""Instruments watch a pass manager: they check, time and print, and change nothing."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from fxcompress.analysis import analyze
from fxcompress.errors import ArtifactError, InputError, VerificationError, did_you_mean
from fxcompress.ir.program import Program
from fxcompress.manager.fingerprint import checksums
from fxcompress.manager.record import Record
from fxcompress.manager.same import same
from fxcompress.pass_base import Guarantee, Pass, Transform
from fxcompress.pipeline.text import Pipeline
from fxcompress.task import Task
from fxcompress.verification import numerics
from fxcompress.verification.numerics import Comparison
from fxcompress.verification.oracle import check_removal
from fxcompress.verification.verifier import verify

logger = logging.getLogger(__name__)


class Instrument:
    """Hooks around a pipeline and each of its passes; a hook that raises stops the run.

    ``after_pass`` returns the record, perhaps completed; later instruments get what it returns.
    """

    def before_pipeline(self, program: Program, pipeline: Pipeline, task: Task | None) -> None:
        """Called once, with the Program that the first pass gets."""

    def before_pass(self, program: Program, item: Pass) -> None:
        """Called with the Program as the pass finds it."""

    def after_pass(self, before: Program, after: Program, record: Record) -> Record:
        """Called with the Program before and after the pass; for an analysis they are the same."""
        return record

    def after_pipeline(self, program: Program, records: tuple[Record, ...]) -> None:
        """Called once, when every pass has run."""


def default_instruments() -> list[Instrument]:
    """What a manager uses when it is given no instruments: :class:`Verify` and :class:`Oracle`."""
    return [Verify(), Oracle()]


_Compare = Callable[[Program, Program, Callable[[Program], object]], Comparison]

_COMPARE: Mapping[Guarantee, _Compare] = {
    "exact": numerics.check_exact,
    "lossy": lambda before, after, rewrite: numerics.measure(before, after),
}


class Verify(Instrument):
    """Checks each rewritten Program: normal form, then its output against the Program before.

    Outputs are left out on the meta device. It also reads every weight before and after a transform, since a write that
    autograd's version counter misses (through ``.data`` or NumPy) would reach the caller's model.
    """

    def __init__(self) -> None:
        self._weights: dict[str, int] = {}
        self._task: Task | None = None

    def before_pipeline(self, program: Program, pipeline: Pipeline, task: Task | None) -> None:
        self._task = task

    def before_pass(self, program: Program, item: Pass) -> None:
        self._weights = checksums(program) if isinstance(item, Transform) else {}

    def after_pass(self, before: Program, after: Program, record: Record) -> Record:
        if not isinstance(record.item, Transform):
            return record
        found = checksums(before)
        written = next((name for name, weight in self._weights.items() if found[name] != weight), None)
        if written is not None:
            raise VerificationError(
                f"{record.item.name!r} wrote into the tensor {written!r}, which the caller's model may share; "
                "put a new tensor in place instead"
            )
        if not record.changed:
            return record
        verify(after)
        if on_meta(before):
            return record
        rewrite = partial(_rewrite, record.item, self._task)
        return replace(record, comparison=_COMPARE[record.item.guarantee](before, after, rewrite))


def on_meta(program: Program) -> bool:
    """Whether a Program has no values to compute with."""
    return any(getattr(leaf, "is_meta", False) for leaf in program.interface.leaves)


def _rewrite(item: Transform, task: Task | None, program: Program) -> None:
    for name in item.requires:
        analyze(program, name, task)
    item.run(program, task)


class Oracle(Instrument):
    """Checks what a transform that removes parts left, against the Program before it with those parts masked.

    Left out on the meta device, where there is nothing to compute with.
    """

    def after_pass(self, before: Program, after: Program, record: Record) -> Record:
        if isinstance(record.item, Transform) and record.changed and not on_meta(before):
            kept = record.item.kept(before)
            if kept is not None:
                check_removal(before, after, kept)
        return record


class AnalysisCheck(Instrument):
    """Computes preserved analyses afresh after each rewrite: catches a pass that preserves what it breaks.

    Args:
        skip: Analyses that never give the same value twice, such as measured ones.
    """

    def __init__(self, skip: Collection[str] = ()) -> None:
        self.skip = frozenset(skip)

    def after_pass(self, before: Program, after: Program, record: Record) -> Record:
        for analysis, cached in after._analyses.items() if record.changed else ():
            fresh = after.copy()
            fresh._analyses.clear()
            if analysis.name not in self.skip and not same(cached.value, analyze(fresh, analysis, cached.task)):
                raise VerificationError(
                    f"{record.item.name!r} says that it preserves the analysis {analysis.name!r}, but its value "
                    "changed; take it out of 'preserves'"
                )
        return record


class Timing(Instrument):
    """Logs how long each pass took, and what the copies and checks around them took.

    Attributes:
        seconds: Pass text with its position -> seconds, of the last run.
        total: Seconds of the last run, checks included.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.total = 0.0
        self._started = 0.0

    def before_pipeline(self, program: Program, pipeline: Pipeline, task: Task | None) -> None:
        self.seconds, self.total, self._started = {}, 0.0, time.perf_counter()

    def after_pass(self, before: Program, after: Program, record: Record) -> Record:
        self.seconds[f"{record.index:02d} {record.text}"] = record.seconds
        return record

    def after_pipeline(self, program: Program, records: tuple[Record, ...]) -> None:
        self.total = time.perf_counter() - self._started
        for label, seconds in self.seconds.items():
            logger.info("%8.3f s  %s", seconds, label)
        logger.info("%8.3f s  copies and checks", self.total - sum(self.seconds.values()))


class PrintAfter(Instrument):
    """Logs the Program's text after the named passes, or after every pass when none is named."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def before_pipeline(self, program: Program, pipeline: Pipeline, task: Task | None) -> None:
        known = [item.name for item in pipeline]
        for name in self.names:
            if name not in known:
                near = did_you_mean(name, known) or f"; its passes: {', '.join(known)}"
                raise InputError(f"the pipeline has no pass {name!r} to print after{near}")

    def after_pass(self, before: Program, after: Program, record: Record) -> Record:
        if not self.names or record.item.name in self.names:
            logger.info("after %s:\n%s", record.text, after.text())
        return record


class Dump(Instrument):
    """Writes the Program's text into a folder: ``00-input.txt``, then ``01-NAME.txt``, ... after each transform.

    Put it before :class:`Verify` to have the text of a Program that fails. Dumps of an earlier run are removed.

    Raises:
        ArtifactError: If the folder cannot be written.
    """

    _HEADER = "# fxcompress dump: "

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)

    def before_pipeline(self, program: Program, pipeline: Pipeline, task: Task | None) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for path in self.directory.glob("[0-9][0-9]-*.txt"):
                with path.open(encoding="utf-8") as file:
                    ours = file.readline().startswith(self._HEADER)
                if ours:
                    path.unlink()
        except (OSError, UnicodeDecodeError) as error:
            raise ArtifactError(
                f"cannot dump into {self.directory}: {error}; give a folder that can be written"
            ) from error
        self._write("00-input", str(pipeline), program)

    def after_pass(self, before: Program, after: Program, record: Record) -> Record:
        if record.result is not None:
            self._write(f"{record.index:02d}-{record.item.name}", record.text, after)
        return record

    def _write(self, name: str, title: str, program: Program) -> None:
        path = self.directory / f"{name}.txt"
        try:
            path.write_text(f"{self._HEADER}{title}\n{program.text()}", encoding="utf-8")
        except OSError as error:
            raise ArtifactError(f"cannot write {path}: {error}; give a folder that can be written") from error
