"""Makes a model compute in integers: quantize and dequantize nodes where the target engine looks for them.

Values become integers by the affine mapping of Jacob et al. (2018, arXiv:1712.05877); the range of each comes from
calibration batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from fxcompress.passes.quantization import weights
from fxcompress.passes.quantization.grid import QuantizationParameters, Range
from fxcompress.passes.quantization.nodes import is_quantization, quantize_dequantize, quantized, skipped
from fxcompress.passes.quantization.placement import Placement, Point
from fxcompress.passes.quantization.processor import has_vnni
from fxcompress.passes.quantization.rewrites import (
    flatten_rows,
    pool_mean,
    slice_channels,
    slice_roll,
    split_attention,
    split_gate,
)
from fxcompress.passes.quantization.targets import ATTENTION, ATTENTION_OPERANDS, MEANS, PADS, PIECES, Target, target_of
from fxcompress.passes.ranges import Ranges
from torch import fx

from fxcompress.analysis import analyze
from fxcompress.errors import InputError
from fxcompress.ir import macs
from fxcompress.ir.lowering import lowered
from fxcompress.ir.ops import Operation, operation, operations
from fxcompress.ir.program import Program
from fxcompress.ir.weighted import weighted_layer
from fxcompress.pass_base import Guarantee, PassResult, Refusal, Transform
from fxcompress.task import Task

aten = torch.ops.aten

_MOST_APART = 16
"""How many times as much an operand of a join may span as another with the same scale: 4 of 8 bits are left then."""


@dataclass(frozen=True)
class InsertQdq(Transform):
    """Puts quantize and dequantize nodes where the target engine computes in int8.

    Weights become integers per output channel, biases stay as they are, and nothing stands between operators that the
    engine computes as one. Refuses, naming the layer: ``no-integer-kernel``, ``slower-in-integers``,
    ``computed-weight``, ``empty-weight``, ``constant-operand``, ``not-float32``, ``not-finite``, ``unbounded-range``,
    ``ranges-apart``; and, as a whole, a Program that has such nodes already (``already-quantized``).

    Attributes:
        target: Engine that will run the model.
        skip: Patterns of layers to keep in floating point: qualified names of modules, or of nodes.
        observer: How ranges follow from the calibration batches; see the analysis ``ranges``.
        batches: How many of the task's calibration batches to use.
        least: Calibration samples that must be there.
        weight_bits: Bits of the integers that weights become; engines keep them in 8.
        granularity: What has a scale of its own: each output channel of a weight, or the weight as a whole.
        vnni: Whether the processor that will run the model adds up products of integers in 32 bits (VNNI, AMX, Arm's
            dot product); none asks the one of this machine. Without it weights are kept from saturating sums in 16
            bits, and what the engine computes slower in integers than in float32 stays as it is.
    """

    name: ClassVar[str] = "insert-qdq"
    guarantee: ClassVar[Guarantee] = "lossy"

    target: str = "openvino"
    skip: tuple[str, ...] = ()
    observer: str = "minmax"
    batches: int = 64
    least: int = 8
    weight_bits: int = 8
    granularity: Literal["channel", "tensor"] = "channel"
    vnni: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        target_of(self.target)
        if not 2 <= self.weight_bits <= 8:
            raise InputError(f"weight_bits must be from 2 to 8, not {self.weight_bits}")

    def run(self, program: Program, task: Task | None) -> PassResult:
        """Counts the ``layers`` and ``activations`` that became integers."""
        root, target = program.graph_module, target_of(self.target)
        target = target if self._vnni else target.without_slow()
        if there := next(filter(is_quantization, program.nodes), None):
            return PassResult(False, (_already(there),), {"layers": 0, "activations": 0})
        refusals = {refusal.node: refusal for refusal in _objections(root, target)}
        floating = skipped(program.nodes, self.skip) | {node for node in program.nodes if node.name in refusals}
        rewritten = _write_for(target, [call for call in operations(root) if call.node not in floating])
        placement = Placement(root, target, floating)
        points = placement.points()
        if not points:
            return PassResult(rewritten, tuple(refusals.values()), {"layers": 0, "activations": 0})
        analysis = Ranges(self.observer, self.batches, self.least, symmetric=target.grid.symmetric)
        ranges = analyze(program, analysis, task).ranges
        while unbounded := [point for point in points if not ranges[point.source.name].finite]:
            refused = {reader: point.source for point in unbounded for reader in point.readers}
            refusals.update({reader.name: _unbounded(reader, source) for reader, source in refused.items()})
            placement = Placement(root, target, floating := floating | refused.keys())
            points = placement.points()
        if apart := dict(_apart(placement.joined(), ranges)):
            refusals.update({join.name: refusal for join, refusal in apart.items()})
            points = Placement(root, target, floating, apart).points()
        for point, parameters in zip(points, _parameters(points, ranges), strict=True):
            integers = quantize_dequantize(point.source, parameters)
            for reader in point.readers:
                reader.replace_input_with(point.source, integers)
        nodes = [node for node in program.nodes if node not in floating]
        layers = sum(self._quantize_weight(root, node, target) for node in nodes)
        return PassResult(
            rewritten or bool(points), tuple(refusals.values()), {"layers": layers, "activations": len(points)}
        )

    @property
    def _vnni(self) -> bool:
        return has_vnni() if self.vnni is None else self.vnni

    def _quantize_weight(self, root: fx.GraphModule, node: fx.Node, target: Target) -> bool:
        """Makes integers of the weight of a layer whose input is integers; tells whether it is one."""
        call = operation(root, node)
        layer = weighted_layer(call) if call is not None and call.overload in target.layers else None
        scale = None if layer is None else _scale(root, layer.operation["input"], target)
        if layer is None or scale is None:
            return False
        made = _scale_of_result(root, node, target) if target.rounds_biases else None
        scales = weights.channel_scales(layer, scale, self.weight_bits, not self._vnni, made)
        if self.granularity == "tensor":
            scales = scales.max().repeat(len(scales))
        weights.quantize_weight(root, layer, lowered(root, layer.operation), scales, self.weight_bits)
        return True


def _already(node: fx.Node) -> Refusal:
    reason = (
        "it quantizes, and only a model with no such nodes gets a placement; run insert-qdq on the model as it was, "
        "in place of quantize-weights or quantize-dynamic"
    )
    return Refusal("already-quantized", node.name, reason)


def _objections(root: fx.GraphModule, target: Target) -> Iterator[Refusal]:
    """Layers and products that must stay in floating point."""
    for call in operations(root):
        if call.overload not in macs.RULES:
            continue
        split = target.splits_attention and call.overload is ATTENTION
        objection = _other_dtype(call, ATTENTION_OPERANDS) if split else _objection(call, target)
        if objection is not None:
            code, reason = objection
            yield Refusal(code, call.node.name, reason)


def _objection(call: Operation, target: Target) -> tuple[str, str] | None:
    read = target.reads(call.overload)
    if not read and call.overload in target.slow:
        reason = "without VNNI the engine is slower at it in integers; for a processor that has it set vnni=true"
        return "slower-in-integers", reason
    if aten.linear.default in target.layers and weights.multiplies_stored_matrix(call):
        return "constant-operand", weights.STORED_MATRIX
    if not read:
        return "no-integer-kernel", f"the target has no integer kernel for {call.overload}; it stays in floating point"
    if any(name in call.state for name in read):
        return "constant-operand", "it multiplies by a tensor of the model's state; write it as a linear layer"
    return _other_dtype(call, read) if call.overload in target.products else weights.objection(call)


def _other_dtype(call: Operation, names: Iterable[str]) -> tuple[str, str] | None:
    dtypes = {call[name].meta["val"].dtype for name in names if name in call.operands} - {torch.float32}
    if not dtypes:
        return None
    dtype = dtypes.pop()
    return "not-float32", f"it computes in {dtype}, and only torch.float32 becomes integers; convert the model first"


def _unbounded(reader: fx.Node, source: fx.Node) -> Refusal:
    reason = f"it reads {source.name}, which is infinite or NaN on calibration batches; no grid holds that"
    return Refusal("unbounded-range", reader.name, reason)


def _apart(joined: Mapping[fx.Node, list[fx.Node]], ranges: Mapping[str, Range]) -> Iterator[tuple[fx.Node, Refusal]]:
    """Joins that would leave an operand few integers if all had one scale."""
    for join, origins in joined.items():
        spans = {origin: ranges[origin.name].united(Range(0, 0)).span for origin in origins}
        spans = {origin: span for origin, span in spans.items() if span}  # any scale is as good for zeros
        if not spans:
            continue
        least, most = min(spans, key=spans.__getitem__), max(spans, key=spans.__getitem__)
        if spans[most] > _MOST_APART * spans[least]:
            reason = (
                f"{most.name} spans {spans[most] / spans[least]:.0f} times as much as {least.name}, to which one scale "
                "for both would leave few integers; each has its own"
            )
            yield join, Refusal("ranges-apart", join.name, reason)


def _write_for(target: Target, calls: list[Operation]) -> bool:
    """Writes operators the way the target looks for them; tells whether any changed."""
    done = False
    made_of_integers = {call.node for call in calls if call.overload in target.closed}
    for call in calls:
        if call.overload in target.gates and made_of_integers.issuperset(call.node.all_input_nodes):
            done |= split_gate(call, target.gates[call.overload])
        elif target.pools_means and call.overload in MEANS:
            done |= pool_mean(call)
        elif target.slices and call.overload in PIECES:
            done |= slice_channels(call)
        elif target.slices and call.overload is aten.roll.default:
            done |= slice_roll(call)
        elif target.splits_attention and call.overload is ATTENTION:
            done |= split_attention(call)
        elif target.flattens_rows and call.overload is aten.linear.default:
            done |= flatten_rows(call)
    return done


def _parameters(points: list[Point], ranges: Mapping[str, Range]) -> list[QuantizationParameters]:
    """Scale and zero point of each point; those that share them cover the ranges of all."""
    united: dict[int, Range] = {}
    for point in points:
        found = ranges[point.source.name]
        united[point.sharing] = united.get(point.sharing, found).united(found)
    return [point.grid.parameters(united[point.sharing]) for point in points]


def _scale_of_result(root: fx.GraphModule, node: fx.Node, target: Target) -> float | None:
    """The scale of the integers that are made of a layer's result, if all who read it read those."""
    while len(node.users) == 1:
        (node,) = node.users
        if node.target is quantized.quantize_per_tensor.default:
            scale: Any = node.args[1]
            return float(scale)
        call = operation(root, node)
        if call is None or call.overload not in target.fused:
            return None
    return None


def _scale(root: fx.GraphModule, node: fx.Node, target: Target) -> float | None:
    """The scale of the integers that a value is made of, if it is."""
    while node.target is not quantized.dequantize_per_tensor.default:
        call = operation(root, node)
        if call is None or call.overload not in target.views | target.joins | PADS:
            return None
        node = node.all_input_nodes[0]
    scale: Any = node.args[1]
    return float(scale)
