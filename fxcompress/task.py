"""The task: what the user knows about the model's job, for passes that calibrate, train or measure accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxcompress.errors import InputError


@dataclass(frozen=True, eq=False)
class Task:
    """Data and measures for one model; every part is optional, and a pass that needs one says so.

    Attributes:
        calibration: Batches to observe activations on; iterated more than once.
        training: Batches to train on, usually a ``DataLoader``; iterated once per epoch.
        loss: ``loss(outputs, batch)`` -> scalar tensor.
        evaluate: ``evaluate(module)`` -> the metric's value.
        metric: What ``evaluate`` measures, for reports; its last word may be a unit, as in ``top-1 %``.
        inputs: ``inputs(batch)`` -> the model's inputs, in any form ``trace`` takes. By default a tuple or list batch
            holds the inputs first, as in ``(images, labels)``, and any other batch is the inputs.

    Raises:
        InputError: If a part does not fit, such as a generator that can be read only once.
    """

    calibration: Iterable[Any] | None = None
    training: Iterable[Any] | None = None
    loss: Callable[[Any, Any], torch.Tensor] | None = None
    evaluate: Callable[[nn.Module], float] | None = None
    metric: str = "metric"
    inputs: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        for name in ("calibration", "training"):
            _check_batches(name, getattr(self, name))
        for name in ("loss", "evaluate", "inputs"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise InputError(f"Task.{name} must be a function, not {value!r}")
        if not isinstance(self.metric, str) or not self.metric:
            raise InputError(f"Task.metric must name what 'evaluate' measures, not {self.metric!r}")

    def model_inputs(self, batch: Any) -> Any:
        """The model's inputs in a batch."""
        if self.inputs is not None:
            return self.inputs(batch)
        if isinstance(batch, (tuple, list)) and not batch:
            raise InputError(f"a batch is an empty {type(batch).__name__}; its first entry is the model's input")
        return batch[0] if isinstance(batch, (tuple, list)) else batch

    def __repr__(self) -> str:
        parts = [
            f"{name}={_shown_batches(value)}"
            for name, value in (("calibration", self.calibration), ("training", self.training))
            if value is not None
        ]
        parts += [
            f"{name}={getattr(value, '__qualname__', type(value).__qualname__)}"
            for name, value in (("loss", self.loss), ("evaluate", self.evaluate), ("inputs", self.inputs))
            if value is not None
        ]
        if self.evaluate is not None:
            parts.append(f"metric={self.metric!r}")
        return f"Task({', '.join(parts)})"


def check_task(task: Any) -> None:
    """Raises :class:`InputError` unless ``task`` is a :class:`Task` or ``None``."""
    if task is not None and not isinstance(task, Task):
        raise InputError(f"task must be a fxcompress.Task, not {type(task).__name__}; write Task(evaluate=..., ...)")


def _shown_batches(batches: Iterable[Any]) -> str:
    count = f"{len(batches)} batches" if isinstance(batches, Sized) else "batches"
    return f"<{type(batches).__name__} of {count}>"


def _check_batches(name: str, batches: Any) -> None:
    if batches is None:
        return
    if isinstance(batches, (torch.Tensor, Mapping, str)):
        raise InputError(f"Task.{name} must hold batches, but a {type(batches).__name__} is one; write [batch]")
    if not isinstance(batches, Iterable):
        raise InputError(f"Task.{name} must be an iterable of batches, not {batches!r}")
    if isinstance(batches, Iterator):
        raise InputError(
            f"Task.{name} is a {type(batches).__name__}, which can be read only once; "
            "give list(...) of it or a DataLoader"
        )
    if isinstance(batches, Sized) and len(batches) == 0:
        raise InputError(f"Task.{name} has no batches; give at least one")
