"""Calibration batches as a Program takes them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from fxcompress.errors import InputError
from fxcompress.ir.program import Program
from fxcompress.task import Task
from fxcompress.tracing.inputs import split_call


def calibration_inputs(program: Program, task: Task | None, reader: str, count: int) -> list[list[Any]]:
    """The flat inputs of the first calibration batches, all in memory; as :func:`calibration_stream` otherwise."""
    return list(calibration_stream(program, task, reader, count))


def calibration_stream(program: Program, task: Task | None, reader: str, count: int) -> Iterator[list[Any]]:
    """The flat inputs of the first calibration batches, one at a time.

    Args:
        program: The Program that they are for.
        task: The task that holds them.
        reader: Name of the pass that needs them, for messages.
        count: How many batches to take.

    Raises:
        InputError: There are none, they do not fit the Program, or it has no weights to compute with.
    """
    if any(getattr(leaf, "is_meta", False) for leaf in program.interface.leaves):
        raise InputError(f"{reader} computes activations, but the model is on the meta device; load its weights first")
    if task is None or task.calibration is None:
        raise InputError(
            f"{reader} needs calibration batches: give task=fxcompress.Task(calibration=[batch, ...]), "
            "or --calibration FILE on the command line"
        )
    index = -1
    for index, batch in enumerate(itertools.islice(task.calibration, count)):
        args, kwargs = split_call(task.model_inputs(batch))
        try:
            leaves = program.flatten_batch(args, kwargs)
        except InputError as error:
            error.add_note(f"calibration batch {index}, read by {reader}")
            if task.inputs is None and isinstance(batch, (tuple, list)):
                error.add_note("the model is given a batch's first entry; Task.inputs can make its inputs of a batch")
            raise
        yield leaves
    if index < 0:
        raise InputError(f"{reader} needs calibration batches, but Task.calibration gave none")
