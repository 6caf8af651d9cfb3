"""Refits what stays before channels go, so that one-shot removal hurts as little as it can.

Each layer that will see less, or something else, gets the filters and shift that come closest to its old outputs:
least squares over the calibration batches, as in channel pruning (He et al. 2017, arXiv:1707.06168) and ThiNet (Luo et
al. 2017, arXiv:1707.06342). Layers are fitted in order, each on the values that the fitted layers before it leave, so
errors do not pile up. The mean of what goes is taken up by the layer's bias, or by the batch norm after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from fxcompress.passes.calibrated.least_squares import Fit, Moments, fit
from fxcompress.passes.calibrated.patches import sample
from fxcompress.passes.calibrated.progress import shown
from fxcompress.passes.calibrated.streams import Streams
from fxcompress.passes.channels.kept import kept_shapes
from fxcompress.passes.channels.plan import planned
from torch import fx

from fxcompress.calibration import calibration_inputs
from fxcompress.errors import InputError
from fxcompress.ir.ops import Operation, operation, readers, replace_state
from fxcompress.ir.program import Program
from fxcompress.ir.weighted import WeightedLayer, successor, weighted_layer
from fxcompress.pass_base import Guarantee, PassResult, Refusal, Transform
from fxcompress.task import Task
from fxcompress.verification.oracle import Oracle

aten = torch.ops.aten

_PLACES_FOR_EACH = 256
"""Places that are enough for each weight of a filter."""


@dataclass(frozen=True)
class Compensate(Transform):
    """Refits, from calibration batches, the layers after the channels that remove-channels is about to remove.

    Goes between select-channels and remove-channels: it needs what is still there to know what the outputs were.
    Filters of inputs that go become zero, so what it reports as its error is what removal will cost. Refuses, naming
    the layer: ``shared-weight``, ``computed-weight``, ``not-finite``.

    Attributes:
        plan: JSON file of a plan; none for that of the last select-channels.
        batches: How many of the task's calibration batches to use; all of them are in memory together.
        places: How many places of a layer's output to fit to, over all batches; fewer where a filter is small, as in
            a depthwise convolution.
        penalty: How strongly filters are held to what they were, relative to the mean square of an input; none to
            choose it for each layer by cross-validation between batches.
        seed: Seed of the choice of places.
    """

    name: ClassVar[str] = "compensate"
    requires: ClassVar[tuple[str, ...]] = ("channels",)
    preserves: ClassVar[tuple[str, ...]] = ("channels", "cost", "select-channels")
    guarantee: ClassVar[Guarantee] = "lossy"

    plan: str | None = None
    batches: int = 16
    places: int = 32768
    penalty: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batches < 1 or self.places < 2:
            raise InputError("compensate needs at least 1 batch and 2 places")
        if self.penalty is not None and self.penalty < 0:
            raise InputError(f"penalty must be at least 0, not {self.penalty}")

    def run(self, program: Program, task: Task | None) -> PassResult:
        """Counts the layers ``refitted`` and gives the share of their relative squared errors that is left."""
        _, report, removed = planned(program, self.plan, self.name)
        if not removed.any():
            return PassResult(changed=False, statistics={"refitted": 0})
        root = program.graph_module
        inputs = calibration_inputs(program, task, self.name, self.batches)
        kept = kept_shapes(report, removed)
        original, oracle = program.copy().graph_module, Oracle(program, kept)
        streams = Streams(
            lambda: fx.Interpreter(original), lambda: Oracle(program, kept), lambda node: node.name in kept, inputs
        )
        refit = _Refit(root, streams, oracle, self.places, self.penalty, torch.Generator().manual_seed(self.seed))
        for node in shown(streams, self.name):
            refit.visit(node)
        before, after = sum(fit.before for fit in refit.fits), sum(fit.after for fit in refit.fits)
        left = round(100 * after / before, 1) if before > 0 else 0.0
        statistics = {"refitted": len(refit.fits), "% of error left": left}
        return PassResult(bool(refit.fits), tuple(refit.refusals), statistics)


class _Refit:
    """Fits one layer after the other as the streams reach it."""

    def __init__(
        self,
        root: fx.GraphModule,
        streams: Streams,
        oracle: Oracle,
        places: int,
        penalty: float | None,
        generator: torch.Generator,
    ) -> None:
        self._root, self._streams, self._oracle = root, streams, oracle
        self._places, self._penalty, self._generator = places, penalty, generator
        self._shared = {tensor for tensor, calls in readers(root).items() if len(calls) > 1}
        self.fits: list[Fit] = []
        self.refusals: list[Refusal] = []

    def visit(self, node: fx.Node) -> None:
        """Refits the layer that a node calls, if it reads anything that differs."""
        call = operation(self._root, node)
        layer = weighted_layer(call) if call is not None else None
        if layer is None or not self._streams.changed(layer.operation["input"]):
            return
        objection = next(self._objections(layer), None)
        if objection is None:
            norm = self._norm_after(layer)
            filters = self._filters(layer)
            found = self._fit(layer, filters, norm is not None or layer.operation["bias"] is not None)
            if found is not None:
                self._put(layer, norm, filters, found)
                self.fits.append(found)
                return
            objection = "not-finite", "its activations on the calibration batches are not finite"
        self.refusals.append(Refusal(objection[0], node.name, objection[1]))

    def _objections(self, layer: WeightedLayer) -> Iterator[tuple[str, str]]:
        call = layer.operation
        computed = sorted(name for name in call.operands if name != "input")
        if computed:
            yield "computed-weight", f"its {computed[0]} is computed in the graph, so nothing can be put in its place"
        if any(id(call[name]) in self._shared for name in call.state):
            yield "shared-weight", "another call reads its weight too; give each its own"

    def _norm_after(self, layer: WeightedLayer) -> Operation | None:
        """A batch norm whose running mean can take a shift up, where the layer has no bias."""
        users = list(layer.node.users)
        norm = operation(self._root, users[0]) if len(users) == 1 and layer.operation["bias"] is None else None
        if norm is None or norm.overload is not aten.batch_norm.default or norm["training"]:
            return None
        mean = norm.parameter("running_mean")
        own = mean is not None and id(mean) not in self._shared
        return norm if own and layer.layout.channel_dim(layer.node.meta["val"].dim()) == 1 else None

    def _filters(self, layer: WeightedLayer) -> _Filters:
        call = layer.operation
        x, y = next(self._streams.pairs(call["input"], layer.node))
        parts = layer.layout.split(call["weight"].detach().double())
        groups, outputs, inputs = parts.shape[:3]
        return _Filters(
            parts,
            self._kept_channels(call["input"], x, layer).expand(groups * inputs).reshape(groups, inputs),
            self._kept_channels(layer.node, y, layer).expand(groups * outputs).reshape(groups, outputs),
        )

    def _kept_channels(self, node: fx.Node, value: torch.Tensor, layer: WeightedLayer) -> torch.Tensor:
        every = torch.ones(1, dtype=torch.bool, device=value.device)
        return self._oracle.keeps(node, value).get(layer.layout.channel_dim(value.dim()), every)

    def _fit(self, layer: WeightedLayer, filters: _Filters, shifted: bool) -> Fit | None:
        old, columns = filters.matrix(), filters.columns
        none = Moments.zero(old)
        halves = [none, none]
        pairs = list(self._streams.pairs(layer.operation["input"], layer.node))
        keeps = self._oracle.keeps(layer.node, pairs[0][1])
        places = min(self._places, _PLACES_FOR_EACH * old.shape[1])
        for index, (x, y) in enumerate(pairs):
            found = sample(layer, x, y, keeps, max(places // len(pairs), 1), self._generator)
            inputs, outputs = found.inputs[:, :, columns].flatten(2), found.outputs * filters.outputs
            second = found.position >= 0.5 if len(pairs) == 1 else torch.full(found.position.shape, index % 2 == 1)
            for half, chosen in enumerate((~second, second)):
                halves[half] = halves[half].add(inputs[chosen], outputs[chosen])
        if not all(half.finite for half in halves):
            return None
        return fit((halves[0], halves[1]), old, shifted=shifted, penalty=self._penalty)

    def _put(self, layer: WeightedLayer, norm: Operation | None, filters: _Filters, found: Fit) -> None:
        call = layer.operation
        weight = layer.layout.join(filters.with_matrix(found.weight))
        replace_state(self._root, call["weight"], successor(call["weight"], weight))
        shift = found.shift.flatten()
        if norm is not None:
            mean = norm["running_mean"]
            replace_state(self._root, mean, successor(mean, mean.double() - shift))
        elif call["bias"] is not None:
            replace_state(self._root, call["bias"], successor(call["bias"], shift))


@dataclass(frozen=True, eq=False)
class _Filters:
    """A layer's weight, and which of its channels stay.

    Attributes:
        parts: ``(groups, outputs per group, inputs per group, *kernel)``.
        inputs: ``(groups, inputs per group)``.
        outputs: ``(groups, outputs per group)``.
    """

    parts: torch.Tensor
    inputs: torch.Tensor
    outputs: torch.Tensor

    @property
    def columns(self) -> torch.Tensor:
        """Inputs to fit: without groups those that stay, else all, since each group may keep others."""
        if len(self.inputs) == 1:
            return self.inputs[0].nonzero().flatten()
        return torch.arange(self.inputs.shape[1], device=self.inputs.device)

    def matrix(self) -> torch.Tensor:
        """What is there now, as ``(groups, inputs, outputs)``."""
        return (self.parts[:, :, self.columns].flatten(2) * self.outputs[:, :, None]).mT

    def with_matrix(self, matrix: torch.Tensor) -> torch.Tensor:
        """Like ``parts``, with a new matrix and zeros where channels go."""
        columns, kernel = self.columns, self.parts.shape[3:]
        made = torch.zeros_like(self.parts)
        made[:, :, columns] = matrix.mT.reshape(*self.parts.shape[:2], len(columns), *kernel)
        stay = self.outputs[:, :, None] & self.inputs[:, None, :]
        return made * stay.reshape(*stay.shape, *(1 for _ in kernel))
