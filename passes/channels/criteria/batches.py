"""Running a Program on a task's batches without touching what it shares with the caller's model."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sized
from typing import Any

import torch
from fxcompress.passes.channels.criteria.registry import Evidence
from rich.console import Console
from rich.progress import track
from torch import nn

from fxcompress.errors import InputError
from fxcompress.ir.program import Program, clone_graph_module
from fxcompress.tracing.inputs import split_call
from fxcompress.tracing.untouched import seeded


def isolated(program: Program) -> Program:
    """The Program in eval mode with parameters that get gradients of their own and buffers of their own.

    Values of parameters are shared with ``program``; nothing that runs the result writes into them.
    """

    def take(tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(tensor.detach(), tensor.is_floating_point())
        return tensor.detach().clone()

    copied = program.copy()
    clone = clone_graph_module(copied.graph_module, copied.graph, take).eval()
    return Program(clone, program.interface, (), program.name)


def batches(evidence: Evidence, name: str, given: Iterable[Any]) -> Iterator[Any]:
    """The first batches of a task, drawn with the evidence's seed, with a progress bar where someone looks on."""
    console = Console(stderr=True)
    total = min(evidence.batches, len(given)) if isinstance(given, Sized) else evidence.batches
    with seeded(evidence.seed):
        chosen = itertools.islice(given, evidence.batches)
        yield from track(
            chosen, f"criterion {name}", total, console=console, transient=True, disable=not console.is_terminal
        )


def observed_inputs(evidence: Evidence, name: str, program: Program) -> Iterator[list[Any]]:
    """The flat inputs of the batches to observe activations on: those for calibration, else those to train on.

    Raises:
        InputError: The task has neither.
    """
    task = evidence.task
    given = None if task is None else task.calibration if task.calibration is not None else task.training
    if given is None:
        raise missing(name, "batches", "task=fxcompress.Task(calibration=[...])")
    for batch in batches(evidence, name, given):
        args, kwargs = call_of(evidence, batch)
        yield program.flatten_batch(args, kwargs)


def call_of(evidence: Evidence, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The ``(args, kwargs)`` of the model for a batch."""
    assert evidence.task is not None
    return split_call(evidence.task.model_inputs(batch))


def missing(name: str, what: str, remedy: str) -> InputError:
    """The error for a task that lacks something."""
    return InputError(f"criterion={name} needs {what}, which the task does not have; give {remedy}")
