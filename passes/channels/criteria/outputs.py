"""A criterion that expands the model's outputs: it needs inputs, but neither a loss nor labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from fxcompress.passes.channels.criteria.batches import isolated, observed_inputs
from fxcompress.passes.channels.criteria.reads import Read, reads
from fxcompress.passes.channels.criteria.registry import Evidence, criterion
from fxcompress.passes.channels.criteria.totals import Scores, Totals
from fxcompress.passes.channels.groups import ChannelReport
from fxcompress.passes.channels.units import NONE, Array
from torch import fx

from fxcompress.ir.ops import Operation, operations
from fxcompress.ir.program import Program

aten = torch.ops.aten


@criterion("output", scale="loss")
def output(evidence: Evidence) -> Scores:
    """Expected squared change of the outputs without the unit, relative to their squares.

    For each layer that reads a channel, the mean square of the channel x the mean square of the derivative of the
    outputs by it: the diagonal of the Gauss-Newton matrix, with the two factors taken as independent, as K-FAC does
    (arXiv:1503.05671). Derivatives are those of random projections of the outputs.

    A few batches do not show what every channel is there for, but running statistics do. So where batches pass batch
    normalizations, they pass them a second time as noise of the mean and variance of training, half of it common to a
    sample's places; both views of a layer's channels count alike.
    """
    program = isolated(evidence.program)
    for parameter in program.graph_module.parameters():
        parameter.requires_grad_(False)
    random = torch.Generator().manual_seed(evidence.seed)
    norms = {call.node: call for call in operations(program.graph_module) if _has_statistics(call)}
    found = reads(program, evidence.report)
    views = [_View(program, found, {}, random)]
    if norms:
        views.append(_View(program, found, norms, random))
    for inputs in observed_inputs(evidence, "output", program):
        for view in views:
            view.take(inputs, random)
    totals = Totals(evidence.report)
    for own in found.values():
        for read in own:
            seen = [view.seen[read] for view in views if view.seen[read].count]
            if seen:  # no output has a derivative by what is behind argmax, a comparison or detach
                totals.add(_ended(read, evidence.report), _combined([each.score for each in seen]) / len(own))
    return totals.sum()


def _has_statistics(call: Operation) -> bool:
    return (
        call.overload is aten.batch_norm.default
        and not call["training"]
        and all(call.arguments.get(name) is not None for name in ("running_mean", "running_var"))
    )


def _combined(views: list[Scores]) -> Scores:
    """Scores with the arithmetic mean of the views' distributions, and the geometric mean of their totals."""
    known = [scores for scores in views if scores.sum() > 0]
    if not known:
        return views[0]
    total = np.prod([scores.sum() ** (1 / len(known)) for scores in known])
    found: Scores = total * np.mean([scores / scores.sum() for scores in known], axis=0)
    return found


def _ended(read: Read, report: ChannelReport) -> Array:
    """The units of a read but those that its outputs carry on, as in a depthwise convolution: they are read later."""
    layout = report.layouts.get(read.call.node.name)
    if layout is None:
        return read.units
    onward = [report.resolved(factor).ravel() for dim in layout for factor in dim if not factor.is_position]
    return np.where(np.isin(read.units, np.concatenate(onward)), NONE, read.units) if onward else read.units


@dataclass
class _Moments:
    """Sums over batches for the elements of one read."""

    count: int = 0
    squares: Scores = field(default_factory=lambda: np.zeros(1))
    gradients: Scores = field(default_factory=lambda: np.zeros(1))

    def add(self, flat: torch.Tensor, slope: torch.Tensor) -> None:
        """Takes values and their derivatives, ``(elements, places)``."""
        self.count += flat.shape[1]
        self.squares = self.squares + flat.square().sum(1).cpu().double().numpy()
        self.gradients = self.gradients + slope.square().sum(1).cpu().double().numpy()

    @property
    def score(self) -> Scores:
        return self.squares / max(self.count, 1) * self.gradients


class _View(fx.Interpreter):
    """Runs a graph with batch norms as they are, or with noise in place of what some give, and derives its outputs."""

    def __init__(
        self,
        program: Program,
        found: Mapping[fx.Node, list[Read]],
        noisy: Mapping[fx.Node, Operation],
        random: torch.Generator,
    ) -> None:
        super().__init__(program.graph_module)
        self._reads, self._noisy, self._random = found, noisy, random
        self._given: list[tuple[Read, torch.Tensor]] = []
        self.seen = {read: _Moments() for own in found.values() for read in own}

    def take(self, inputs: list[Any], random: torch.Generator) -> None:
        """Adds one batch."""
        with torch.enable_grad():
            outputs = [value for value in self.run(*inputs) if _derivable(value)]
            if outputs:
                total = torch.stack([_projected(value, random) for value in outputs]).sum()
                total.backward()  # type: ignore[no-untyped-call]
        for read, values in self._given:
            if values.grad is not None:
                given, slope = (read.elements(tensor, read.dim) for tensor in (values.detach(), values.grad))
                self.seen[read].add(given.float(), slope.float())
        self._given.clear()

    def run_node(self, n: fx.Node) -> Any:
        saved: dict[fx.Node, torch.Tensor] = {}
        for read in self._reads.get(n, ()):
            source = read.call.operands[read.operand]
            saved[source] = saved.get(source, self.env[source])
            self.env[source] = self._watched(read, self.env[source])
        value = super().run_node(n)
        self.env.update(saved)
        return self._noise(self._noisy[n], value) if n in self._noisy else value

    def _watched(self, read: Read, values: torch.Tensor) -> torch.Tensor:
        """The values by themselves, so that their derivative is that of this read alone."""
        own = values.view_as(values) if values.requires_grad else values.detach().requires_grad_()
        own.retain_grad()
        self._given.append((read, own))
        return own

    def _noise(self, call: Operation, value: torch.Tensor) -> torch.Tensor:
        """Noise whose derivative is that of the value."""
        rest = [1] * (value.dim() - 2)
        samples, places = ([*value.shape[:2], *rest], value.shape) if rest else (value.shape, value.shape)
        noise = (self._normal(samples, value) + self._normal(places, value)) * 0.5**0.5
        for name, combine in (("weight", torch.mul), ("bias", torch.add)):
            operand = self.env[call[name]] if isinstance(call[name], fx.Node) else call[name]
            if operand is not None:
                noise = combine(noise, operand.detach().reshape(-1, *rest))
        given: torch.Tensor = value + (noise - value).detach()
        return given

    def _normal(self, shape: Any, like: torch.Tensor) -> torch.Tensor:
        return torch.randn(shape, generator=self._random).to(like)


def _derivable(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _projected(value: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """A random sum of a value's elements, relative to their root mean square."""
    signs = torch.randint(2, value.shape, generator=random).mul(2).sub(1).to(value)
    size = value.detach().square().mean().sqrt()
    return (value * signs).sum() / torch.where(size > 0, size, 1)
