"""Takes the mean of the quantization error out of each layer's output.

Rounding weights and activations moves the mean of a layer's outputs, which the layers after it feel more than noise:
inputs behind a ReLU have a mean, and times the sum of a filter's rounding errors that is a constant. The bias takes it
up, measured on calibration batches layer after layer ("data-free quantization", Nagel et al. 2019, arXiv:1906.04721;
with data, Banner et al. 2019, arXiv:1810.05723).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from fxcompress.passes.calibrated.progress import shown
from fxcompress.passes.quantization.layers import objections, quantized_layer
from fxcompress.passes.quantization.streams import mean_error, quantized_streams

from fxcompress.calibration import calibration_inputs
from fxcompress.errors import InputError
from fxcompress.ir.marks import is_done, mark_done
from fxcompress.ir.program import Program
from fxcompress.pass_base import Guarantee, PassResult, Transform
from fxcompress.task import Task


@dataclass(frozen=True)
class CorrectBias(Transform):
    """Corrects the biases of quantized layers by the mean error of their outputs on calibration batches.

    Goes after insert-qdq. Layers are corrected in order, each on what the corrected layers before it give, and once:
    afterwards what a layer gave in floating point is no longer known. Refuses, naming the layer: ``shared-weight``,
    ``computed-bias``.

    Attributes:
        batches: How many of the task's calibration batches to use; all of them are in memory together.
    """

    name: ClassVar[str] = "correct-bias"
    guarantee: ClassVar[Guarantee] = "lossy"

    batches: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batches < 1:
            raise InputError(f"batches must be at least 1, not {self.batches}")

    def run(self, program: Program, task: Task | None) -> PassResult:
        """Counts the layers ``corrected``."""
        root = program.graph_module
        refusals = {refusal.node: refusal for refusal in objections(root)}
        fresh = [node for node in program.nodes if node.name not in refusals and not is_done(node, self.name)]
        layers = {node: quantized_layer(root, node) for node in fresh}
        wanted = {node: layer for node, layer in layers.items() if layer is not None}
        if not wanted:
            return PassResult(False, tuple(refusals.values()), {"corrected": 0})
        streams = quantized_streams(program, calibration_inputs(program, task, self.name, self.batches))
        corrected = 0
        for node in shown(streams, self.name):
            layer = wanted.get(node)
            if layer is not None:
                shift = mean_error(streams, layer)
                if bool(torch.isfinite(shift).all()) and bool(shift.any()):
                    layer.shift_bias(root, shift)
                    mark_done(node, self.name)
                    corrected += 1
        return PassResult(corrected > 0, tuple(refusals.values()), {"corrected": corrected})
