"""Analyses of a Program: computed once, kept on it, dropped when a transform does not preserve them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, TypeVar, overload

from fxcompress import registry
from fxcompress.errors import InputError, VerificationError, did_you_mean
from fxcompress.ir.program import Program
from fxcompress.manager.fingerprint import difference, fingerprint
from fxcompress.pass_base import Analysis, Pass
from fxcompress.pipeline.text import parse
from fxcompress.task import Task, check_task

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Cached:
    """The value of an analysis and the task that it was computed with."""

    value: Any
    task: Task | None


@overload
def analyze(program: Program, analysis: Analysis[T], task: Task | None = None) -> T: ...
@overload
def analyze(program: Program, analysis: str, task: Task | None = None) -> Any: ...
def analyze(program: Program, analysis: Analysis[Any] | str, task: Task | None = None) -> Any:
    """The value of an analysis, from the Program's cache when it is there.

    A cached value is used when no task is given or it was computed with the same one.

    Args:
        program: The Program, which is not changed.
        analysis: An analysis, or its text, such as ``cost`` or ``latency{runs=10}``.
        task: What the analysis may need to know about the model's job.

    Raises:
        InputError: If there is no such analysis, or ``program`` is not a Program.
        VerificationError: If the analysis changes the Program.
    """
    given: Any = program
    if not isinstance(given, Program):
        raise InputError(f"analyze needs a Program, not {type(given).__name__}; make one with fxcompress.trace")
    check_task(task)
    return _analyze(program, resolve(analysis), task, ())


def resolve(analysis: Analysis[Any] | str) -> Analysis[Any]:
    """The analysis that is meant; raises :class:`InputError` with near names if it is none."""
    found: Any = analysis
    if isinstance(analysis, str):
        name = analysis.partition("{")[0].strip()
        if "," not in name and name not in registry.names():
            raise InputError(f"there is no analysis {name!r}{_near(name)}")
        passes = parse(analysis).passes
        if len(passes) > 1:
            raise InputError(f"{analysis!r} names {len(passes)} passes; give one analysis")
        found = passes[0]
    if isinstance(found, Analysis):
        return found
    if isinstance(found, Pass):
        raise InputError(f"{found.name!r} is a transform, not an analysis{_near(found.name)}")
    remedy = f"{found.__name__}()" if isinstance(found, type) else "its name or an Analysis"
    raise InputError(f"{found!r} is not an analysis; give {remedy}")


def _near(name: str) -> str:
    known = [name for name in registry.names() if issubclass(registry.get(name), Analysis)]
    return did_you_mean(name, known) or f"; analyses: {', '.join(known)}"


def invalidate(program: Program, preserved: Collection[str]) -> None:
    """Drops every cached analysis whose name is not in ``preserved``."""
    program._analyses = {key: value for key, value in program._analyses.items() if key.name in preserved}


def latest(program: Program, name: str) -> Any | None:
    """The value of the analysis of that name that was asked for last, or ``None`` if none is cached."""
    found = [cached.value for key, cached in program._analyses.items() if key.name == name]
    return found[-1] if found else None


def _analyze(program: Program, analysis: Analysis[Any], task: Task | None, waiting: tuple[str, ...]) -> Any:
    cached = program._analyses.get(analysis)
    if cached is not None and (task is None or cached.task is task):
        program._analyses[analysis] = program._analyses.pop(analysis)  # the last one asked for is the last one
        return cached.value
    if analysis.name in waiting:
        raise InputError(f"analyses require each other: {' -> '.join([*waiting, analysis.name])}; break the circle")
    for name in analysis.requires:
        _analyze(program, resolve(name), task, (*waiting, analysis.name))
    before = fingerprint(program)
    value = analysis.run(program, task)
    change = difference(before, fingerprint(program))
    if change is not None:
        raise VerificationError(f"the analysis {analysis.name!r} changed the Program ({change}); analyses only read")
    program._analyses[analysis] = Cached(value, task)
    return value
