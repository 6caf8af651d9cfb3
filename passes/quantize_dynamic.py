"""Linear layers in int8 whose inputs get a grid of their own at each call: nothing is calibrated.

Weights become integers per output channel; the range of what a layer reads is found when it is run ("dynamic
quantization", Krishnamoorthi 2018, arXiv:1806.08342). It suits transformers, whose activations differ from call to
call, and costs one more look at each activation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from fxcompress.passes.quantization import weights
from fxcompress.passes.quantization.nodes import quantize_at_run_time, skipped
from fxcompress.passes.quantization.processor import has_vnni
from torch import fx

from fxcompress.errors import InputError
from fxcompress.ir.lowering import lowered
from fxcompress.ir.ops import Operation, argument_names, operation
from fxcompress.ir.program import Program
from fxcompress.ir.weighted import weighted_layer
from fxcompress.pass_base import Guarantee, PassResult, Refusal, Transform
from fxcompress.task import Task

aten = torch.ops.aten


@dataclass(frozen=True)
class QuantizeDynamic(Transform):
    """Makes linear layers compute in int8 with grids found at each call; needs no calibration.

    A grid holds the whole batch, so what a row gives depends, by rounding, on the rows beside it. ONNX files are
    written the way onnxruntime finds its integer kernels. A layer whose weight is quantized already is left alone.
    Refuses, naming the layer: ``computed-weight``, ``not-float32``, ``not-finite``, ``empty-weight``,
    and of what is no layer and multiplies by stored weights ``constant-operand`` and ``no-integer-kernel``.

    Attributes:
        skip: Patterns of layers to leave: qualified names of modules, or of nodes.
        weight_bits: Bits of the integers that weights become; engines keep them in 8.
        vnni: As for insert-qdq: whether the processor that will run the model needs no weights that keep sums of
            products in 16 bits; none asks the one of this machine.
    """

    name: ClassVar[str] = "quantize-dynamic"
    guarantee: ClassVar[Guarantee] = "lossy"

    skip: tuple[str, ...] = ()
    weight_bits: int = 8
    vnni: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.weight_bits <= 8:
            raise InputError(f"weight_bits must be from 2 to 8, not {self.weight_bits}")

    def run(self, program: Program, task: Task | None) -> PassResult:
        """Counts the ``layers`` that compute in integers and the ``activations`` that they read."""
        root, refusals = program.graph_module, list[Refusal]()
        grids: dict[fx.Node, fx.Node] = {}
        layers = 0
        kept = skipped(program.nodes, self.skip)
        for node in list(program.nodes):
            call = operation(root, node)  # looked up here: the layer before it may just have been replaced
            if call is None or node in kept or weights.is_quantized(call):
                continue
            if call.overload is not aten.linear.default:
                refusals += weights.other_products(call)
                continue
            objection = weights.objection(call)
            if objection is not None:
                code, reason = objection
                refusals.append(Refusal(code, call.node.name, reason))
                continue
            self._quantize(root, call, grids)
            layers += 1
        return PassResult(layers > 0, tuple(refusals), {"layers": layers, "activations": len(grids)})

    def _quantize(self, root: fx.GraphModule, call: Operation, grids: dict[fx.Node, fx.Node]) -> None:
        """Puts nodes before a layer; those that read one value share its grid."""
        layer = weighted_layer(call)
        assert layer is not None
        vnni = has_vnni() if self.vnni is None else self.vnni
        scales = weights.channel_scales(layer, 0.0, self.weight_bits, pairs=not vnni)
        source, reader = call.operands["input"], lowered(root, call)
        weights.quantize_weight(root, layer, reader, scales, self.weight_bits)
        if source not in grids:
            grids[source] = quantize_at_run_time(source)
        reader.update_arg(argument_names(call.overload).index("input"), grids[source])
