"""Calibration of islands: what each is called with while the model around them runs on the task's batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from fxcompress.errors import InputError
from fxcompress.task import Task
from fxcompress.tracing import PartialProgram
from fxcompress.tracing.inputs import split_call
from fxcompress.tracing.untouched import seeded


def island_tasks(partial: PartialProgram, task: Task | None) -> Mapping[str, Task | None]:
    """The task of each island, by its path: calls instead of batches; training and loss are of the model as a whole."""
    if task is None or task.calibration is None:
        return dict.fromkeys(partial.islands, None if task is None else Task())
    host = partial.emit()
    return {path: Task(calibration=IslandCalls(host, path, task), inputs=lambda call: call) for path in partial.islands}


@dataclass(frozen=True)
class IslandCalls:
    """The positional and keyword inputs of an island, call by call.

    Every iteration runs the model anew, so that no more than one batch is in memory.

    Attributes:
        host: The model.
        path: Where the island is in it.
        task: Has the batches of the model.
    """

    host: nn.Module
    path: str
    task: Task

    def __iter__(self) -> Iterator[Any]:
        called = False
        for index, batch in enumerate(self.task.calibration or ()):
            args, kwargs = split_call(self.task.model_inputs(batch))
            try:
                calls = self._calls(args, kwargs)
            except Exception as error:
                raise InputError(f"{type(self.host).__name__} fails on calibration batch {index}: {error}") from error
            called |= bool(calls)
            yield from calls
        if not called:
            raise InputError(
                f"no calibration batch makes {type(self.host).__name__} call its island {self.path!r}; give batches "
                "that do, or compress the other islands by themselves (PartialProgram.islands, with_islands)"
            )

    def _calls(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        calls: list[Any] = []
        handle = self.host.get_submodule(self.path).register_forward_pre_hook(
            lambda _, *given: calls.append(tree_map_only(torch.Tensor, torch.clone, given)), with_kwargs=True
        )  # clones, as the code around an island may write into what it gave
        try:
            with torch.no_grad(), seeded():
                self.host(*args, **kwargs)
        finally:
            handle.remove()
        return calls
