"""``compress``: from a model to a smaller one in a single call."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.export import ExportedProgram

from fxcompress.errors import InputError
from fxcompress.formatting import UNITS
from fxcompress.ir.program import Program
from fxcompress.island_calibration import island_tasks
from fxcompress.manager.pass_manager import PassManager, Result
from fxcompress.pass_base import Pass
from fxcompress.pipeline.recipes import choose
from fxcompress.pipeline.text import Pipeline
from fxcompress.report.rows import Measure
from fxcompress.task import Task, check_task
from fxcompress.tracing import PartialProgram, trace
from fxcompress.tracing.inputs import Dynamic

if TYPE_CHECKING:
    from fxcompress.report import Report


@dataclass(frozen=True, eq=False)
class Compressed:
    """A compressed model.

    Attributes:
        program: The Program after the last pass; the model around its compressed islands if it was given as one.
        report: What was done, layer by layer and pass by pass, and what was refused.
        pipeline: The passes that ran.
        before: The Program as traced.
    """

    program: Program | PartialProgram
    report: Report
    pipeline: Pipeline
    before: Program | PartialProgram = field(repr=False)

    @cached_property
    def model(self) -> nn.Module:
        """The compressed model: trainable, with the original's signature and weights of its own.

        A ``torch.fx.GraphModule``, or a copy of the original with its islands replaced by such.
        """
        return self.program.emit()

    def save(self, path: str | PathLike[str]) -> None:
        """Writes :attr:`program` as an artifact that :func:`fxcompress.load` reads.

        What :attr:`model` learned since is not in it; trace the trained model to save it.

        Raises:
            ArtifactError: If the file cannot be written, or the model was captured in part only.
        """
        from fxcompress.artifact import save

        program: Any = self.program  # one captured in part only is refused there
        save(program, path, pipeline=str(self.pipeline), report=json.loads(self.report.to_json()))

    def __repr__(self) -> str:
        return f"Compressed({repr(self.report).removeprefix('Report(')}"


def compress(
    model: nn.Module | ExportedProgram | Program | PartialProgram,
    example_inputs: Any = None,
    pipeline: str | Pipeline | Sequence[Pass] = "default",
    *,
    task: Task | None = None,
    dynamic: Dynamic | None = None,
    batch_dim: int | None = 0,
) -> Compressed:
    """Traces a model and runs a pipeline on it; the model itself is not changed.

    Args:
        model: What :func:`fxcompress.trace` takes, or a Program, or what :func:`fxcompress.trace_islands` gives: then
            each island is compressed, on what the model calls it with on the task's calibration batches.
        example_inputs: As for :func:`fxcompress.trace`; not needed for a model that is traced already.
        pipeline: Name of a recipe, pipeline text, or passes.
        task: What is known about the model's job; with ``task.evaluate``, the report gets its value before and after.
        dynamic: As for :func:`fxcompress.trace`.
        batch_dim: As for :func:`fxcompress.trace`.

    Raises:
        InputError: If the inputs do not fit the model, or the pipeline is wrong (found before anything is traced).
        CaptureError: If the model cannot be captured as a whole.
        VerificationError: If a pass breaks the model.
    """
    check_task(task)
    manager = PassManager(choose(pipeline))
    traced = _traced(model, example_inputs, dynamic, batch_dim)
    program, report = (
        _run_islands(manager, traced, task) if isinstance(traced, PartialProgram) else _run(manager, traced, task)
    )
    if task is not None and task.evaluate is not None:
        report = replace(report, measures=(*report.measures, _metric(task, traced, program)))
    return Compressed(program, report, manager.pipeline, traced)


def _traced(
    model: Any, example_inputs: Any, dynamic: Dynamic | None, batch_dim: int | None
) -> Program | PartialProgram:
    if not isinstance(model, (Program, PartialProgram)):
        return trace(model, example_inputs, dynamic=dynamic, batch_dim=batch_dim)
    if example_inputs is not None or dynamic is not None:
        raise InputError(
            f"a {type(model).__name__} has its example inputs and dynamic dims: leave out example_inputs and dynamic"
        )
    return model


def _run(manager: PassManager, program: Program, task: Task | None) -> tuple[Program, Report]:
    result = manager.run(program, task)
    return result.program, result.report


def _run_islands(manager: PassManager, partial: PartialProgram, task: Task | None) -> tuple[PartialProgram, Report]:
    from fxcompress.report.islands import merged

    tasks = island_tasks(partial, task)
    results = {path: _run_island(manager, path, island, tasks[path]) for path, island in partial.islands.items()}
    slim = partial.with_islands({path: result.program for path, result in results.items()})
    reports = {path: result.report for path, result in results.items()}
    return slim, merged(type(partial.model).__name__, reports, partial.diagnostics)


_ISLANDS_LACK = (
    ", which is calibrated on the calls that the model makes; training and loss of the task are of the whole"
)


def _run_island(manager: PassManager, path: str, island: Program, task: Task | None) -> Result:
    try:
        return manager.run(island, task)
    except Exception as error:
        error.add_note(f"in the island {path!r}" + (_ISLANDS_LACK if task is not None else ""))
        raise


def _metric(task: Task, before: Program | PartialProgram, after: Program | PartialProgram) -> Measure:
    """The task's metric on both; the last word of its name may be a unit, as in ``top-1 %``."""
    name, _, unit = task.metric.rpartition(" ")
    if not name or unit not in UNITS:
        name, unit = task.metric, ""
    return Measure(name, _evaluate(task, before), _evaluate(task, after), unit)


def _evaluate(task: Task, program: Program | PartialProgram) -> float:
    assert task.evaluate is not None
    value: Any = task.evaluate(program.emit())
    try:
        return float(value)
    except (TypeError, ValueError):
        raise InputError(f"Task.evaluate must return a number, not {value!r}") from None
