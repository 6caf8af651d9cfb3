"""Trains what compression has left: fine-tuning, or quantization-aware training where values become integers.

Weights that removal has sliced, or that Q/DQ nodes round, are rarely the best of their shape; a few epochs from where
they are find better ones (Han et al. 2015, arXiv:1506.02626). Values that become integers do so in every step, with
gradients passed straight through (Jacob et al. 2018, arXiv:1712.05877).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from fxcompress.passes.calibrated.progress import shown_batches
from fxcompress.passes.quantization.straight_through import StraightThrough
from torch import nn
from torch.utils._pytree import tree_unflatten

from fxcompress.errors import InputError
from fxcompress.ir.ops import get_state, replace_states
from fxcompress.ir.program import Program, clone_graph_module
from fxcompress.pass_base import Guarantee, PassResult, Refusal, Transform
from fxcompress.task import Task
from fxcompress.tracing.inputs import split_call
from fxcompress.tracing.untouched import seeded


@dataclass(frozen=True)
class Train(Transform):
    """Trains the weights on the task's training batches, with its loss.

    Batch norms and dropout are in training mode; the learning rate falls to 0 along a cosine. Parameters
    that do not require gradients stay as they are; where there are no others, ``nothing-trainable`` is refused.

    Attributes:
        epochs: How often to go through the training batches.
        rate: Learning rate to start with.
        optimizer: adamw, or sgd with Nesterov momentum 0.9.
        weight_decay: Weight decay of the optimizer.
        seed: Seed of the order of batches and of dropout.
    """

    name: ClassVar[str] = "train"
    preserves: ClassVar[tuple[str, ...]] = ("channels", "cost")
    guarantee: ClassVar[Guarantee] = "lossy"

    epochs: int = 1
    rate: float = 1e-3
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs < 1:
            raise InputError(f"epochs must be at least 1, not {self.epochs}")
        if self.rate <= 0:
            raise InputError(f"rate must be above 0, not {self.rate:g}")
        if self.weight_decay < 0:
            raise InputError(f"weight-decay must be at least 0, not {self.weight_decay:g}")

    def run(self, program: Program, task: Task | None) -> PassResult:
        """Gives the ``steps`` taken, and the mean loss of the ``first`` and the ``last`` epoch."""
        student = _Student(program, task)
        if not student.weights:
            reason = "no parameter requires a gradient; call requires_grad_(True) on those to train"
            return PassResult(False, (Refusal("nothing-trainable", program.name, reason),), {"steps": 0})
        optimizer = _OPTIMIZERS[self.optimizer](student.weights, self.rate, self.weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)
        epochs: list[list[float]] = []
        with seeded(self.seed), torch.enable_grad():
            for number in range(1, self.epochs + 1):
                epochs.append([*student.epoch(optimizer, f"{self.name}, epoch {number} of {self.epochs}")])
                schedule.step()
        replace_states(program.graph_module, dict(student.successors()))
        first, last = (round(statistics.fmean(epochs[index]), 4) for index in (0, -1))
        return PassResult(True, statistics={"steps": sum(map(len, epochs)), "first": first, "last": last})


_OPTIMIZERS: Mapping[str, Callable[[list[nn.Parameter], float, float], torch.optim.Optimizer]] = {
    "adamw": lambda weights, rate, decay: torch.optim.AdamW(weights, lr=rate, weight_decay=decay),
    "sgd": lambda weights, rate, decay: torch.optim.SGD(
        weights, lr=rate, weight_decay=decay, momentum=0.9, nesterov=True
    ),
}


class _Student:
    """A Program with weights of its own, in training mode.

    Attributes:
        weights: The parameters that learn.

    Raises:
        InputError: There is nothing to learn from, or nothing to compute with.
    """

    def __init__(self, program: Program, task: Task | None) -> None:
        if any(getattr(leaf, "is_meta", False) for leaf in program.interface.leaves):
            raise InputError("train computes with weights, but the model is on the meta device; load its weights first")
        if task is None or task.training is None or task.loss is None:
            raise InputError(
                "train needs batches to train on and a loss: give task=fxcompress.Task(training=loader, "
                "loss=...), a function of (outputs, batch)"
            )
        self._program, self._task = program, task
        self._training, self._loss = task.training, task.loss
        self._module = clone_graph_module(program.graph_module, program.copy().graph, _own).train()
        self.weights = [weight for weight in self._module.parameters() if weight.requires_grad]

    def epoch(self, optimizer: torch.optim.Optimizer, title: str) -> Iterator[float]:
        """A step for each training batch; gives the losses."""
        step = 0
        for step, batch in enumerate(shown_batches(self._training, title), start=1):
            loss = self._loss(self._outputs(batch), batch)
            if not bool(torch.isfinite(loss)):
                raise InputError(f"the loss is {loss.item()} at step {step} of {title}; give a smaller rate")
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            yield loss.item()
        if step == 0:
            raise InputError("train needs batches to train on, but Task.training gave none")

    def _outputs(self, batch: Any) -> Any:
        args, kwargs = split_call(self._task.model_inputs(batch))
        leaves = self._program.flatten_batch(args, kwargs)
        return tree_unflatten(list(StraightThrough(self._module).run(*leaves)), self._program.interface.out_spec)

    def successors(self) -> Iterator[tuple[int, torch.Tensor]]:
        """``id`` of a tensor of the Program -> what it has become."""
        for name, learned in (*self._module.named_parameters(), *self._module.named_buffers()):
            yield id(get_state(self._program.graph_module, name)), learned


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that training may write into."""
    copied = tensor.detach().clone()
    return nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied
