"""Equalizes channels before quantization, by factors that move from the layers that read them to those that make them.

All channels of an activation share one scale, and all inputs of a filter another, so what is small beside the rest is
rounded coarsely. Since ReLU, sums, pooling and views commute with a positive factor for each channel,

    W2 f(W1 x + b1)  =  (W2 / m) f(m W1 x + m b1)

and m is free ("cross-layer equalization", Nagel et al. 2019, arXiv:1906.04721). The affine part of a normalization
takes factors up too ("SmoothQuant", Xiao et al. 2022, arXiv:2211.10438), as do the values of attention and what a gate
is multiplied with.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from fxcompress.passes.calibrated.progress import shown_batches
from fxcompress.passes.equalization.factors import Seen, factors_of, vector
from fxcompress.passes.equalization.operators import aten, bounds
from fxcompress.passes.equalization.regions import Key, Region, Regions, Side
from fxcompress.passes.quantization.nodes import QUANTIZED
from torch import fx

from fxcompress.analysis import analyze
from fxcompress.calibration import calibration_stream
from fxcompress.errors import InputError
from fxcompress.ir.lowering import read_state
from fxcompress.ir.marks import is_done, mark_done
from fxcompress.ir.ops import free_name, operation, readers, replace_state, set_state
from fxcompress.ir.program import Program
from fxcompress.ir.weighted import successor, weighted_layer
from fxcompress.pass_base import Guarantee, PassResult, Refusal, Transform
from fxcompress.task import Task
from fxcompress.tracing.untouched import seeded


@dataclass(frozen=True)
class Equalize(Transform):
    """Moves factors of channels between layers, so that rounding to integers errs less; the outputs stay.

    Goes before insert-qdq. Factors are chosen from calibration batches, once for each place, and only where the error
    of rounding is expected to get less. Refuses, naming the node: ``no-factor`` (something on the way gives no multiple
    for a multiple), ``channels``, ``clamp``, ``shared-weight``, ``computed-weight``, ``not-finite``, ``quantized``.

    Attributes:
        batches: How many of the task's calibration batches to use.
        clamps: Whether a clamp such as ReLU6 may get a bound for each channel, which engines do not compute together
            with the layer before it.
    """

    name: ClassVar[str] = "equalize"
    requires: ClassVar[tuple[str, ...]] = ("channels",)
    guarantee: ClassVar[Guarantee] = "exact"

    batches: int = 16
    clamps: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batches < 1:
            raise InputError(f"batches must be at least 1, not {self.batches}")

    def run(self, program: Program, task: Task | None) -> PassResult:
        """Counts the places ``equalized``, each between the layers that make some channels and those that read them."""
        root = program.graph_module
        quantized = next((n for n in program.nodes if getattr(n.target, "namespace", None) == QUANTIZED), None)
        if quantized is not None:
            reason = "values are rounded to integers already; equalize goes before insert-qdq"
            return PassResult(False, (Refusal("quantized", quantized.name, reason),), {"equalized": 0})
        shared = {tensor for tensor, calls in readers(root).items() if len(calls) > 1}
        fresh, refusals = [], []
        for region in Regions(program, analyze(program, "channels", task)):
            objection = next(self._objections(root, region, shared), None)
            if objection is not None:
                refusals.append(Refusal(objection[0], objection[1].name, objection[2]))
            elif not all(is_done(side.node, self.name) for side in region.readers):
                fresh.append(region)
        if not fresh:
            return PassResult(False, tuple(refusals), {"equalized": 0})
        seen = self._seen(program, task, [side for region in fresh for side in region.readers])
        chosen = [(region, factors_of(root, region, seen)) for region in fresh]
        useful = [(region, factors) for region, factors in chosen if factors is not None]
        for region, factors in useful:
            _apply(root, region, factors)
            for side in region.readers:
                mark_done(side.node, self.name)
        return PassResult(bool(useful), tuple(refusals), {"equalized": len(useful)})

    def _objections(
        self, root: fx.GraphModule, region: Region, shared: Collection[int]
    ) -> Iterator[tuple[str, fx.Node, str]]:
        yield from region.objections
        if region.clamps and not self.clamps:
            reason = "its bound is one for all channels; clamps=true gives each its own, which engines compute apart"
            yield "clamp", region.clamps[0].node, reason
        for side in (*region.makers, *region.readers):
            call = operation(root, side.node)
            assert call is not None
            if weighted_layer(call) is not None and "weight" not in call.state:
                yield "computed-weight", side.node, "its weight is computed in the graph; store the weight"
            if any(id(call[name]) in shared for name in call.state):
                yield "shared-weight", side.node, "another call reads its weight or bias too; give each its own"
            if not all(bool(torch.isfinite(call[name]).all()) for name in call.state):
                yield "not-finite", side.node, "its weight or bias holds NaN or Inf; repair the model"

    def _seen(self, program: Program, task: Task | None, sides: list[Side]) -> Mapping[fx.Node, Seen]:
        found = {side.value: Seen.nothing(len(side.keys)) for side in sides}
        dims = {side.value: side.dim for side in sides}
        observer = _Observer(program.graph_module, found, dims)
        batches = calibration_stream(program, task, self.name, self.batches)
        for index, leaves in enumerate(shown_batches(batches, self.name)):
            observer.batch = index
            with torch.no_grad(), seeded():
                observer.run(*leaves)
        return found


class _Observer(fx.Interpreter):
    """Runs a Program and looks at the channels of some values."""

    def __init__(self, root: fx.GraphModule, found: dict[fx.Node, Seen], dims: dict[fx.Node, int]) -> None:
        super().__init__(root)
        self._found, self._dims, self.batch = found, dims, 0

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self._found:
            if not bool(torch.isfinite(value).all()):
                raise InputError(
                    f"{n.name} computes NaN or Inf on calibration batch {self.batch}; check that batch, or the weights "
                    f"of the layers before {n.name}"
                )
            self._found[n].update(value.movedim(self._dims[n], 0).flatten(1))
        return value


def _apply(root: fx.GraphModule, region: Region, factors: Mapping[Key, float]) -> None:
    for side in region.makers:
        _scale_state(root, side, vector(side, factors), made=True)
    for side in region.readers:
        _scale_state(root, side, 1 / vector(side, factors), made=False)
    for side in region.clamps:
        _scale_clamp(root, side, vector(side, factors))


def _scale_state(root: fx.GraphModule, side: Side, factors: torch.Tensor, *, made: bool) -> None:
    """Multiplies what a layer gives, or what it reads, by a factor for each channel."""
    call = operation(root, side.node)
    assert call is not None
    layer, nothing = weighted_layer(call), torch.zeros_like(factors)
    if layer is not None:
        scaled = layer.scaled_outputs if made else layer.scaled_inputs
        weight, bias = scaled(factors.to(call["weight"].device), nothing.to(call["weight"].device))
        replace_state(root, call["weight"], weight)
        if call["bias"] is not None:
            replace_state(root, call["bias"], bias)
        return
    for name in call.state:  # the affine part of a normalization, or a vector that values are multiplied with
        if name in ("weight", "bias") or len(call.state) == 1:
            old = call[name]
            replace_state(root, old, successor(old, old.detach().double() * factors.to(old.device).reshape(old.shape)))


def _scale_clamp(root: fx.GraphModule, side: Side, factors: torch.Tensor) -> None:
    """Gives a clamp a bound for each channel."""
    call = operation(root, side.node)
    limits = bounds(call) if call is not None else None
    assert call is not None
    assert limits is not None
    value = side.node.meta["val"]
    read: list[fx.Node | None] = []
    for end, limit in zip(("min", "max"), limits, strict=True):
        if math.isinf(limit):
            read.append(None)
            continue
        name = free_name(root, "", f"{side.node.name}_{end}")
        shape = (-1, *(1,) * (value.dim() - 1 - side.dim))
        set_state(root, name, (limit * factors).to(value.dtype).reshape(shape))
        read.append(read_state(root, name, side.node))
    with root.graph.inserting_before(side.node):
        made = root.graph.call_function(aten.clamp.Tensor, (call["self"], *read))
    made.meta = dict(side.node.meta)
    side.node.replace_all_uses_with(made)
    root.graph.erase_node(side.node)
