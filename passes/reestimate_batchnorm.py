"""Re-estimates the running statistics of batch norms from calibration batches.

After weights change, running means and variances no longer describe what the batch norms see. As when training with a
cumulative average (``momentum=None``), each batch norm normalizes with the statistics of the batch at hand while those
of all batches are gathered: the mean of all rows, and their variance about it ("precise batch norm", Wu and Johnson
2021, arXiv:2105.07576). That needs batches like those of training: many, mixed and large.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxcompress.calibration import calibration_inputs
from fxcompress.errors import InputError
from fxcompress.ir.ops import Operation, operations, replace_states
from fxcompress.ir.program import Program
from fxcompress.ir.weighted import successor
from fxcompress.pass_base import Guarantee, PassResult, Transform
from fxcompress.task import Task
from fxcompress.tracing.untouched import seeded

aten = torch.ops.aten


@dataclass(frozen=True)
class ReestimateBatchnorm(Transform):
    """Gives batch norms the running statistics of the task's calibration batches.

    Attributes:
        batches: How many of the task's calibration batches to use.
    """

    name: ClassVar[str] = "reestimate-batchnorm"
    preserves: ClassVar[tuple[str, ...]] = ("channels", "cost")
    guarantee: ClassVar[Guarantee] = "lossy"

    batches: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batches < 1:
            raise InputError(f"batches must be at least 1, not {self.batches}")

    def run(self, program: Program, task: Task | None) -> PassResult:
        """Counts the batch norms ``reestimated``."""
        root = program.graph_module
        norms = {call.node: call for call in operations(root) if _keeps_statistics(call)}
        if not norms:
            return PassResult(changed=False, statistics={"reestimated": 0})
        observer = _Observer(root, norms)
        for leaves in calibration_inputs(program, task, self.name, self.batches):
            with torch.no_grad(), seeded():
                observer.run(*leaves)
        replace_states(root, dict(observer.successors()))
        return PassResult(changed=True, statistics={"reestimated": len(norms)})


def _keeps_statistics(call: Operation) -> bool:
    return (
        call.overload is aten.batch_norm.default
        and not call["training"]
        and all(call.parameter(name) is not None for name in ("running_mean", "running_var"))
    )


@dataclass(eq=False)
class _Statistics:
    """Of all rows so far, by channel."""

    rows: int
    mean: torch.Tensor
    squares: torch.Tensor

    def update(self, x: torch.Tensor) -> None:
        """Takes rows ``(channels, rows)`` in (Chan, Golub and LeVeque 1983)."""
        mean = x.mean(1)
        squares = (x - mean[:, None]).square().sum(1)
        rows = self.rows + x.shape[1]
        step = mean - self.mean
        self.squares = self.squares + squares + step.square() * self.rows * x.shape[1] / rows
        self.mean = self.mean + step * x.shape[1] / rows
        self.rows = rows


class _Observer(fx.Interpreter):
    """Runs a Program whose batch norms normalize with the statistics of the batch, and gathers those."""

    def __init__(self, root: fx.GraphModule, norms: dict[fx.Node, Operation]) -> None:
        super().__init__(root)
        self._norms = norms
        self._found: dict[int, _Statistics] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n not in self._norms:
            return super().run_node(n)
        call = self._norms[n]
        x = self.env[call["input"]]
        rows = x.detach().transpose(0, 1).flatten(1).double()
        if rows.shape[1] < 2:
            raise InputError(f"{n.name} sees one value per channel, which has no variance; give larger batches")
        zero = rows.new_zeros(len(rows))
        self._found.setdefault(id(call["running_mean"]), _Statistics(0, zero, zero)).update(rows)
        weight, bias = (
            self.env[call[name]] if isinstance(call[name], fx.Node) else call[name] for name in ("weight", "bias")
        )
        return aten.batch_norm.default(x, weight, bias, None, None, True, 0.0, call["eps"], False)

    def successors(self) -> Iterator[tuple[int, torch.Tensor]]:
        """``id`` of a running statistic -> what takes its place."""
        for call in self._norms.values():
            found = self._found[id(call["running_mean"])]
            yield id(call["running_mean"]), successor(call["running_mean"], found.mean)
            yield id(call["running_var"]), successor(call["running_var"], found.squares / (found.rows - 1))
