"""Weights as integers, activations as they are: a smaller file, and less memory to read for each layer.

Each output channel, or each group of inputs of an output channel, has a scale of its own (4 bits in groups: Dettmers
and Zettlemoyer 2023, arXiv:2212.09720; Frantar et al. 2023, arXiv:2210.17323).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from fxcompress.passes.quantization import weights
from fxcompress.passes.quantization.grid import SMALLEST
from fxcompress.passes.quantization.nodes import call, quantized, skipped
from torch import fx

from fxcompress.errors import InputError
from fxcompress.ir.lowering import lowered, read_state
from fxcompress.ir.ops import Operation, argument_names, free_name, operation, set_state
from fxcompress.ir.program import Program
from fxcompress.ir.weighted import weighted_layer
from fxcompress.pass_base import Guarantee, PassResult, Refusal, Transform
from fxcompress.task import Task

aten = torch.ops.aten


@dataclass(frozen=True)
class QuantizeWeights(Transform):
    """Makes the weights of linear, embedding and convolution layers integers; needs no calibration.

    Weights stay trainable with Q/DQ nodes behind them; exported files hold the integers. A weight that goes through
    such nodes already is left alone. Refuses, naming the layer: ``computed-weight``, ``not-float32``, ``not-finite``,
    ``empty-weight``, ``not-a-matrix``, ``group-size`` (a weight that groups do not divide), and of what is no layer and
    multiplies by stored weights ``constant-operand`` and ``no-integer-kernel``.

    Attributes:
        bits: 2 to 8. ONNX and OpenVINO files pack groups of up to 4 bits; others take a byte.
        group_size: Inputs that share a scale, which must divide those of a layer; 0: all of an output channel.
        skip: Patterns of layers to leave: qualified names of modules, or of nodes.
    """

    name: ClassVar[str] = "quantize-weights"
    guarantee: ClassVar[Guarantee] = "lossy"

    bits: int = 8
    group_size: int = 0
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.bits <= 8:
            raise InputError(f"bits must be 2 to 8, not {self.bits}")
        if self.group_size < 0 or self.group_size == 1:
            raise InputError(f"group-size must be 0 or at least 2, not {self.group_size}")

    def run(self, program: Program, task: Task | None) -> PassResult:
        """Counts the ``layers`` whose weights became integers."""
        root = program.graph_module
        refusals, held, layers = list[Refusal](), dict[tuple[int, int], list[str]](), 0
        kept = skipped(program.nodes, self.skip)
        for node in list(program.nodes):
            found = operation(root, node)
            if found is None or node in kept or weights.is_quantized(found):
                continue
            if not _has_weight(found):
                refusals += weights.other_products(found)
                continue
            refusal = next(self._objections(found), None)
            if refusal is not None:
                refusals.append(refusal)
                continue
            self._quantize(root, found, held)
            layers += 1
        return PassResult(layers > 0, tuple(refusals), {"layers": layers})

    def _objections(self, layer: Operation) -> Iterator[Refusal]:
        weight, name = layer["weight"], layer.node.name
        objection = weights.objection(layer)
        if objection is not None:
            code, reason = objection
            yield Refusal(code, name, reason)
        elif self.group_size and weight.dim() != 2:
            yield Refusal("not-a-matrix", name, "groups need a weight of two dims; quantize it with group-size=0")
        elif self.group_size and weight.shape[1] % self.group_size:
            reason = f"its {weight.shape[1]} inputs are no multiple of {self.group_size}; choose another group-size"
            yield Refusal("group-size", name, reason)

    def _quantize(self, root: fx.GraphModule, layer: Operation, held: dict[tuple[int, int], list[str]]) -> None:
        """Puts Q/DQ nodes between a weight and its reader; readers that agree on its channels share their scales."""
        reader = lowered(root, layer)
        position = argument_names(layer.overload).index("weight")
        weight: Any = reader.args[position]
        largest = 2 ** (self.bits - 1) - 1
        axis = _channel_axis(layer)
        key = id(layer["weight"]), axis
        if key not in held:
            scales = self._scales(layer["weight"].detach(), axis, largest)
            zeros = torch.zeros_like(scales, dtype=torch.int8 if self.group_size else torch.int64)
            held[key] = list(_put(root, layer.state["weight"], {"scale": scales, "zero_point": zeros}))
        scale, zero_point = (read_state(root, name, reader) for name in held[key])
        with root.graph.inserting_before(reader):
            if self.group_size:
                grid = (-largest, largest, torch.int8, self.group_size)
                integers = call(quantized.quantize_per_channel_group.default, (weight, scale, zero_point, *grid))
                blocks = (integers, scale, None, *grid, torch.float32)
                real = call(quantized.dequantize_per_channel_group.default, blocks)
            else:
                channels = (scale, zero_point, axis, -largest, largest, torch.int8)
                integers = call(quantized.quantize_per_channel.default, (weight, *channels))
                real = call(quantized.dequantize_per_channel.default, (integers, *channels))
        reader.update_arg(position, real)

    def _scales(self, weight: torch.Tensor, axis: int, largest: int) -> torch.Tensor:
        """One scale for each channel, or (channels, groups); 1 where all is zero."""
        rows = weight.transpose(0, axis).flatten(1)
        parts = rows.reshape(len(rows), -1, self.group_size) if self.group_size else rows
        scales = parts.abs().amax(-1) / largest
        return torch.where(scales < SMALLEST, 1.0, scales)


def _has_weight(found: Operation) -> bool:
    return found.overload is aten.embedding.default or weighted_layer(found) is not None


def _channel_axis(layer: Operation) -> int:
    found = weighted_layer(layer)
    return 1 if found is not None and found.layout.transposed else 0


def _put(root: fx.GraphModule, weight: str, tensors: dict[str, torch.Tensor]) -> Iterator[str]:
    """Puts tensors beside a weight; gives their names."""
    path, _, leaf = weight.rpartition(".")
    for suffix, tensor in tensors.items():
        name = f"{path}.{free_name(root, path, f'{leaf}_{suffix}')}".lstrip(".")
        set_state(root, name, tensor)
        yield name
