"""Criteria that observe what the readers of a channel (convolutions, linear layers, products) are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from fxcompress.passes.channels.criteria.batches import isolated, observed_inputs
from fxcompress.passes.channels.criteria.reads import reads
from fxcompress.passes.channels.criteria.registry import Evidence, criterion
from fxcompress.passes.channels.criteria.totals import Scores, Totals
from fxcompress.passes.channels.groups import ChannelReport
from torch import fx
from torch._ops import OpOverload

from fxcompress.ir.program import Program

aten = torch.ops.aten


@criterion("activation")
def activation(evidence: Evidence) -> Scores:
    """Mean square of a channel's values."""
    return _observed(evidence, "activation", lambda seen: seen.square)


@criterion("variance")
def variance(evidence: Evidence) -> Scores:
    """Variance of a channel's values: a constant one can move into the bias after it."""
    return _observed(evidence, "variance", lambda seen: seen.variance)


@criterion("wanda")
def wanda(evidence: Evidence) -> Scores:
    """Squared weights of the readers x mean square of the channel (Wanda, arXiv:2306.11695, by channel)."""
    return _observed(evidence, "wanda", lambda seen: seen.energy * seen.square)


@criterion("flap")
def flap(evidence: Evidence) -> Scores:
    """Squared weights of the readers x variance of the channel (FLAP, arXiv:2312.11983)."""
    return _observed(evidence, "flap", lambda seen: seen.energy * seen.variance)


@dataclass
class _Seen:
    """Moments of the elements of one operand's dim, and the squared weights that read each, summed over batches."""

    count: int = 0
    sums: Scores = field(default_factory=lambda: np.zeros(1))
    squares: Scores = field(default_factory=lambda: np.zeros(1))
    energies: Scores = field(default_factory=lambda: np.zeros(1))
    calls: int = 0

    def add(self, flat: torch.Tensor, energy: torch.Tensor) -> None:
        """Takes values ``(elements, places)`` and what reads them, ``(elements,)``."""
        deviation, mean = torch.var_mean(flat.to(torch.promote_types(flat.dtype, torch.float32)), 1, correction=0)
        rows, centre = flat.shape[1], mean.cpu().double().numpy()
        self.count += rows
        self.sums = self.sums + rows * centre
        self.squares = self.squares + rows * (deviation.cpu().double().numpy() + centre**2)
        self.energies = self.energies + energy.cpu().double().numpy()
        self.calls += 1

    @property
    def energy(self) -> Scores:
        return self.energies / self.calls

    @property
    def square(self) -> Scores:
        return self.squares / self.count

    @property
    def variance(self) -> Scores:
        return np.maximum(self.square - (self.sums / self.count) ** 2, 0)


def _observed(evidence: Evidence, name: str, score: Callable[[_Seen], Scores]) -> Scores:
    """Scores by what :class:`_Seen` says of each operand that is contracted over its channels."""
    program = isolated(evidence.program)
    observer = _Observer(program, evidence.report)
    for inputs in observed_inputs(evidence, name, program):
        with torch.no_grad():
            observer.run(*inputs)
    totals = Totals(evidence.report)
    for read, seen in observer.seen.items():
        totals.add(read.units, score(seen))
    return totals.mean()


class _Observer(fx.Interpreter):
    """Runs a graph and keeps the moments of what is contracted over channels."""

    def __init__(self, program: Program, report: ChannelReport) -> None:
        super().__init__(program.graph_module)
        self.reads = reads(program, report)
        self.seen = {read: _Seen() for found in self.reads.values() for read in found}

    def run_node(self, n: fx.Node) -> Any:
        for read in self.reads.get(n, ()):
            values = {
                key: self.env[value] if isinstance(value, fx.Node) else value
                for key, value in read.call.arguments.items()
            }
            energy = _ENERGIES[read.call.overload][read.operand](values)
            flat = read.elements(values[read.operand], read.dim)
            self.seen[read].add(flat, read.elements(energy, 0).mean(1))
        return super().run_node(n)


def _conv(values: dict[str, Any]) -> torch.Tensor:
    weight: torch.Tensor = values["weight"]
    taps = weight.square().flatten(2).sum(2)
    return taps.reshape(values["groups"], -1, weight.shape[1]).sum(1).flatten()


def _transposed(values: dict[str, Any]) -> torch.Tensor:
    weight: torch.Tensor = values["weight"]
    return weight.square().flatten(1).sum(1)


def _linear(values: dict[str, Any]) -> torch.Tensor:
    weight: torch.Tensor = values["weight"]
    return weight.square().reshape(-1, weight.shape[-1]).sum(0)


def _other(name: str, dim: int) -> Callable[[dict[str, Any]], torch.Tensor]:
    """The squares of the other operand along a dim: summed over its free dim, as a mean over the batch."""

    def energy(values: dict[str, Any]) -> torch.Tensor:
        matrices: torch.Tensor = values[name].square().sum(-1 if dim == -2 else -2)
        return matrices.reshape(-1, matrices.shape[-1]).mean(0)

    return energy


_Energy = Callable[[dict[str, Any]], torch.Tensor]
_ENERGIES: Mapping[OpOverload, Mapping[str, _Energy]] = {
    aten.conv1d.default: {"input": _conv},
    aten.conv1d.padding: {"input": _conv},
    aten.conv2d.default: {"input": _conv},
    aten.conv2d.padding: {"input": _conv},
    aten.conv3d.default: {"input": _conv},
    aten.conv3d.padding: {"input": _conv},
    aten.conv_transpose1d.default: {"input": _transposed},
    aten.conv_transpose2d.input: {"input": _transposed},
    aten.conv_transpose3d.input: {"input": _transposed},
    aten.linear.default: {"input": _linear},
    aten.matmul.default: {"self": _other("other", -2), "other": _other("self", -1)},
    aten.bmm.default: {"self": _other("mat2", -2), "mat2": _other("self", -1)},
    aten.scaled_dot_product_attention.default: {"query": _other("key", -1), "key": _other("query", -1)},
}
"""Overload -> operand that is read -> the squares that each of its elements meets there."""
