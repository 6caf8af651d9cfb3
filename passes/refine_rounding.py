"""Rounds weights so that what a layer gives errs least, in place of each weight to the nearest integer.

The rounding errors of a filter's weights meet inputs that go together, so errors can be made to cancel: which of its
two neighbours on the grid each weight takes is chosen on calibration batches, layer after layer, each on what the
quantized layers before it give ("AdaRound", Nagel et al. 2020, arXiv:2004.10568). The search, and how it keeps to what
the data say, is in :mod:`fxcompress.passes.calibrated.rounding`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from fxcompress.passes.calibrated.least_squares import Moments
from fxcompress.passes.calibrated.patches import sample
from fxcompress.passes.calibrated.progress import shown
from fxcompress.passes.calibrated.rounding import WeightGrid, error, refined, regular
from fxcompress.passes.calibrated.streams import Streams
from fxcompress.passes.quantization.layers import QuantizedLayer, objections, quantized_layer
from fxcompress.passes.quantization.streams import mean_error
from torch import fx

from fxcompress.calibration import calibration_inputs
from fxcompress.errors import InputError
from fxcompress.ir.marks import is_done, mark_done
from fxcompress.ir.program import Program
from fxcompress.ir.weighted import WeightedLayer
from fxcompress.pass_base import Guarantee, PassResult, Refusal, Transform
from fxcompress.task import Task

PENALTIES = (1.0, 0.1, 0.01)
"""Penalties to choose from, strongest first."""

_PER_INPUT = 64
"""Places for each input of a filter: more say little, and a depthwise layer copies its inputs for each tap."""


@dataclass(frozen=True)
class RefineRounding(Transform):
    """Rounds the weights of quantized layers so that the layers' outputs err least on calibration batches.

    Goes after insert-qdq and correct-bias: the mean of what a layer gives stays, and only what it does about the mean
    gets better. A layer keeps its rounding unless another one, chosen on one half of the batches, errs less on the
    other half. Weights whose nearest grid point is the chosen one stay, others move to where it is. Refuses, naming the
    layer: ``shared-weight``, ``computed-bias``, ``not-finite``.

    Attributes:
        batches: How many of the task's calibration batches to use; all of them are in memory together.
        places: How many places of each layer's output to look at, over all batches, at most.
        sweeps: How often each weight may change its mind.
        seed: Seed of the choice of places.
    """

    name: ClassVar[str] = "refine-rounding"
    guarantee: ClassVar[Guarantee] = "lossy"

    batches: int = 16
    places: int = 16384
    sweeps: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("batches", 1), ("places", 2), ("sweeps", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, not {getattr(self, name)}")

    def run(self, program: Program, task: Task | None) -> PassResult:
        """Counts the layers ``refined`` and gives the mean share of their rounding errors that is left."""
        root = program.graph_module
        refusals = {refusal.node: refusal for refusal in objections(root)}
        fresh = [node for node in program.nodes if node.name not in refusals and not is_done(node, self.name)]
        layers = {node: quantized_layer(root, node) for node in fresh}
        if not any(layers.values()):
            return PassResult(False, tuple(refusals.values()), {"refined": 0})
        batches = calibration_inputs(program, task, self.name, self.batches)
        before = program.copy().graph_module
        streams = Streams(lambda: fx.Interpreter(before), lambda: fx.Interpreter(root), lambda node: False, batches)
        generator = torch.Generator().manual_seed(self.seed)
        left = []
        for node in shown(streams, self.name):
            layer = layers.get(node)
            if layer is None:
                continue
            halves = self._halves(streams, layer.layer, generator)
            if not all(half.finite for half in halves):
                reason = "what it reads on the calibration batches is not finite; check those batches"
                refusals[node.name] = Refusal("not-finite", node.name, reason)
                continue
            first, second = (half.centred().xx for half in halves)
            rounding = _rounding(root, layer, first, second, self.sweeps)
            if rounding is not None:
                layer.put_weight(root, rounding.weight)
                layer.shift_bias(root, mean_error(streams, layer))
                mark_done(node, self.name)
                left.append(rounding.left)
        share = round(100 * sum(left) / len(left), 1) if left else 100.0
        return PassResult(bool(left), tuple(refusals.values()), {"refined": len(left), "% of error left": share})

    def _halves(self, streams: Streams, layer: WeightedLayer, generator: torch.Generator) -> list[Moments]:
        """Moments of what a layer's filters see, in two halves of the batches."""
        pairs = list(streams.pairs(layer.operation["input"], layer.node))
        count = min(self.places, _PER_INPUT * max(16, _inputs(layer))) // len(pairs)
        halves: list[Moments | None] = [None, None]
        for index, (x, y) in enumerate(pairs):
            found = sample(layer, x, y, {}, max(count, 2), generator)
            inputs, nothing = found.inputs.flatten(2), found.outputs[:, :, :0]
            second = found.position >= 0.5 if len(pairs) == 1 else torch.full(found.position.shape, index % 2 == 1)
            for half, chosen in enumerate((~second, second)):
                known = halves[half] or Moments.zero(inputs.new_empty(*inputs.shape[1:], 0, dtype=torch.float64))
                halves[half] = known.add(inputs[chosen], nothing[chosen])
        return [half for half in halves if half is not None]


def _inputs(layer: WeightedLayer) -> int:
    """Inputs of each filter, taps included."""
    weight = layer.operation["weight"].meta["val"]
    inputs = weight.shape[0] // layer.layout.groups if layer.layout.transposed else weight.shape[1]
    return int(inputs * math.prod(layer.kernel))


@dataclass(frozen=True, eq=False)
class _Rounding:
    """Another weight of a layer, and the share of the rounding error that it leaves on the half not chosen on."""

    weight: torch.Tensor
    left: float


def _rounding(
    root: fx.GraphModule, layer: QuantizedLayer, first: torch.Tensor, second: torch.Tensor, sweeps: int
) -> _Rounding | None:
    """A rounding that is better than the nearest points on the second half too, if there is one."""
    layout, old, grid = layer.layer.layout, layer.weight(root).detach().double(), layer.grid(root)
    parts = layout.split(old)
    weight = parts.flatten(2).mT
    scale = layout.split(grid.scale.double().expand_as(old)).flatten(2).mT
    grid = WeightGrid(scale, grid.quant_min, grid.quant_max)
    nearest = float(error(grid.nearest(weight) - weight, second).sum())
    least, best = nearest, None
    for penalty in PENALTIES:
        found = float(error(refined(weight, regular(first, penalty), grid, 0) - weight, second).sum())
        if found >= least:
            break
        least, best = found, penalty
    if best is None:
        return None
    chosen = refined(weight, regular(first + second, best), grid, sweeps)
    made = grid.rounding_to(chosen, weight).mT.reshape(parts.shape)
    return _Rounding(layout.join(made), least / nearest)
