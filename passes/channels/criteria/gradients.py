"""Criteria that expand the task's loss around the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from fxcompress.passes.channels.criteria.batches import batches, call_of, isolated, missing
from fxcompress.passes.channels.criteria.registry import Evidence, criterion
from fxcompress.passes.channels.criteria.totals import Each, Scores, Totals, marginals, parameters

from fxcompress.errors import InputError


@criterion("taylor", scale="loss")
def taylor(evidence: Evidence) -> Scores:
    """Squared first-order change of the loss without the unit: (sum of gradient x weight)^2 (arXiv:1906.10771)."""
    return _expanded(evidence, "taylor", torch.mul, np.square)


@criterion("fisher", scale="loss")
def fisher(evidence: Evidence) -> Scores:
    """Second-order change of the loss with the empirical Fisher information as curvature: sum of (gradient x weight)^2.

    Optimal brain damage (LeCun et al. 1989) by the diagonal that arXiv:1801.05787 uses, of batches' gradients.
    """
    return _expanded(evidence, "fisher", lambda weight, grad: (weight * grad).square(), np.asarray)


def _expanded(evidence: Evidence, name: str, each: Each, then: Callable[[Scores], Scores]) -> Scores:
    """Adds up, over batches, ``then`` of the sum over an element's weights of ``each(weight, gradient)``."""
    given, loss = _needs(evidence, name)
    program = isolated(evidence.program)
    root = program.graph_module
    dims = {name: units for name, _, units in parameters(evidence.program, evidence.report)}
    sums: dict[tuple[str, int], Scores] = {}
    count = 0
    for batch in batches(evidence, name, given):
        args, kwargs = call_of(evidence, batch)
        with torch.enable_grad():
            value = loss(program(*args, **kwargs), batch)
            _backward(value, name)
        count += 1
        for state, parameter in root.named_parameters():
            if state in dims and parameter.grad is not None:
                for dim, found in marginals(each, dims[state], parameter, parameter.grad).items():
                    key = (state, dim)
                    sums[key] = sums.get(key, 0.0) + then(found)
            parameter.grad = None
    totals = Totals(evidence.report)
    for (state, dim), scores in sums.items():
        totals.add(dims[state][dim], scores / count)
    return totals.mean()


def _needs(evidence: Evidence, name: str) -> tuple[Any, Callable[[Any, Any], torch.Tensor]]:
    task = evidence.task
    if task is None:
        raise missing(name, "a loss and batches", "task=fxcompress.Task(training=..., loss=...)")
    if task.loss is None:
        raise missing(name, "a loss", "Task(loss=...): a function of (outputs, batch)")
    given = task.training if task.training is not None else task.calibration
    if given is None:
        raise missing(name, "batches", "Task(training=...) or Task(calibration=...)")
    return given, task.loss


def _backward(value: Any, name: str) -> None:
    if not isinstance(value, torch.Tensor) or value.numel() != 1 or not value.requires_grad:
        shown = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
        raise InputError(
            f"criterion={name} needs the gradient of the task's loss, but Task.loss gave {shown}; "
            "return one scalar that is computed from the outputs"
        )
    value.backward()  # type: ignore[no-untyped-call]
