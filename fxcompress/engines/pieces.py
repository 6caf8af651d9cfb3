"""Checks a quantized file piece by piece: what it computes between one quantizer of activations and the next.

Rounding to a grid makes a whole step of a difference in the last bit, and deep models amplify steps as they amplify
the noise of quantization: two right files can be as far apart as that noise, in which a scale that is off by some
percent hides. So the file is cut behind its quantizers. Each piece reads what the model's quantizers give, and must
give what the model's next ones give.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from fxcompress.engines.integers import holds_state, is_call
from fxcompress.errors import VerificationError
from fxcompress.ir.program import Interface

_FLIPPED = 0.01
"""Share of a tensor that may be one step off, beside values that lie on the edge between two."""

_OF_A_STEP = 0.02
"""What is less off than this part of a step is the same integer, and what is as near to the edge may become either."""


@dataclass(frozen=True, eq=False)
class Rounded:
    """A value on a grid.

    Attributes:
        value: The value, in floating point.
        step: Distance of neighbours on the grid.
        on_edge: Where it may as well have become the neighbour. After a value on a grid of its own these can be many.
    """

    value: torch.Tensor
    step: float
    on_edge: torch.Tensor


def rounded_values(
    module: fx.GraphModule, interface: Interface, outputs: tuple[str, ...], call: Any
) -> dict[str, Rounded]:
    """What each quantizer of activations gives, by the name that its value has in a file.

    Args:
        module: An emitted module in eval mode.
        interface: How it is called.
        outputs: Names of its output tensors in the file.
        call: Positional and keyword inputs.
    """
    args, kwargs = call
    recorder = _Recorder(module)
    with torch.no_grad():
        result = recorder.run(*args, *(kwargs[name] for name in interface.names[len(args) :]))
    leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    renamed = {id(leaf): name for name, leaf in zip(outputs, leaves, strict=True)}
    return {renamed.get(id(found.value), name): found for name, found in recorder.found.items()}


class _Recorder(fx.Interpreter):
    """Keeps what is dequantized. torch.export names the k-th call of an operator ``operator_k``, the first without."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[str, Rounded] = {}
        self._calls = 0
        self._on_edge: dict[fx.Node, torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if is_call(n, "quantize_per_tensor") and not holds_state(n):
            given, scale, *_ = self.fetch_args_kwargs_from_env(n)[0]
            self._on_edge[n] = ((given.double() / scale).frac().abs() - 0.5).abs() < _OF_A_STEP
        if is_call(n, "dequantize_per_tensor"):
            if (integers := n.all_input_nodes[0]) in self._on_edge:
                step = float(self.fetch_args_kwargs_from_env(n)[0][1])
                name = f"dequantize_per_tensor{f'_{self._calls}' if self._calls else ''}"
                self.found[name] = Rounded(value, step, self._on_edge.pop(integers))
            self._calls += 1
        return value


def check_rounded(expected: Mapping[str, Rounded], found: Mapping[str, torch.Tensor]) -> None:
    """Compares what a cut file computes with what the model computes.

    Raises:
        VerificationError: A value is more than one step off, or more of a tensor than rounding explains.
    """
    for name, value in found.items():
        reference = expected[name].value.cpu()
        if value.shape != reference.shape:
            raise VerificationError(f"{name} is {tuple(value.shape)} where {tuple(reference.shape)} is expected")
        steps = (value.double() - reference.double()).abs() / expected[name].step
        differs = steps > _OF_A_STEP
        unexplained = int((differs & ~expected[name].on_edge.cpu()).sum())
        most = float(steps.max()) if steps.numel() else 0.0
        if not most <= 1 + _OF_A_STEP or unexplained > max(1, _FLIPPED * steps.numel()):
            raise VerificationError(
                f"{name} differs from the model in {int(differs.sum())} of {steps.numel()} values, "
                f"by up to {most:.2g} steps"
            )
