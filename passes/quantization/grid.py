"""Grids of integers and the scale and zero point that map real values to them.

``x`` becomes ``clamp(round(x / scale) + zero_point, quant_min, quant_max)``, the affine mapping of Jacob et al. (2018,
arXiv:1712.05877) that ``quantized_decomposed`` operators, ONNX and OpenVINO share.

A scale that underflows: where a tensor, or a channel, is all zero, or so small that float32 cannot hold
``(high - low) / steps`` as a normal number, any scale is as good, and 1 is taken. Zero is always a point of the grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

SMALLEST = torch.finfo(torch.float32).tiny
"""A scale below this is replaced by 1: its inverse, or its product with another, would not be finite."""


@dataclass(frozen=True)
class Range:
    """The real values from ``low`` to ``high``."""

    low: float
    high: float

    @property
    def finite(self) -> bool:
        """Whether both ends, and the distance between them, are finite in float32."""
        return math.isfinite(self.low) and math.isfinite(self.high) and self.span < _LARGEST

    @property
    def span(self) -> float:
        """Distance of the ends."""
        return self.high - self.low

    def united(self, other: Range) -> Range:
        """The smallest range that holds both."""
        return Range(min(self.low, other.low), max(self.high, other.high))


_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class QuantizationParameters:
    """How one tensor is mapped to integers.

    Attributes:
        scale: Distance of neighbours on the grid.
        zero_point: The integer that stands for 0.
        quant_min: Least integer.
        quant_max: Largest integer.
        dtype: Type that holds them.
    """

    scale: float
    zero_point: int
    quant_min: int
    quant_max: int
    dtype: torch.dtype

    def integers(self, x: torch.Tensor) -> torch.Tensor:
        """The integers that stand for ``x``, in the dtype of ``x``."""
        return (torch.round(x / self.scale) + self.zero_point).clamp(self.quant_min, self.quant_max)

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` on the grid."""
        return (self.integers(x) - self.zero_point) * self.scale


@dataclass(frozen=True)
class Grid:
    """The integers that values of one kind may become.

    Attributes:
        bits: How many bits an integer has.
        symmetric: Whether 0 is the middle of a range with both signs; then values that are never negative become
            unsigned integers, others signed ones. Else any zero point may be.
        signed: Whether integers with any zero point are signed ones.
    """

    bits: int = 8
    symmetric: bool = False
    signed: bool = False

    def parameters(self, found: Range) -> QuantizationParameters:
        """Scale and zero point for a range, widened so that it holds 0."""
        low, high = min(found.low, 0.0), max(found.high, 0.0)
        steps = 2**self.bits - 1
        if self.symmetric and low < 0:
            half = 2 ** (self.bits - 1)
            scale = _usable(max(-low / half, high / (half - 1)))
            return QuantizationParameters(scale, 0, -half, half - 1, torch.int8)
        scale = _usable((high - low) / steps)
        zero_point = min(max(round(-low / scale), 0), steps)
        least = -(2 ** (self.bits - 1)) if self.signed and not self.symmetric else 0
        dtype = torch.int8 if least else torch.uint8
        return QuantizationParameters(scale, zero_point + least, least, steps + least, dtype)


def _usable(scale: float) -> float:
    """The scale in float32, or 1 in place of one that underflows."""
    single = torch.tensor(scale, dtype=torch.float32).item()
    return single if single >= SMALLEST else 1.0
