"""Factors for the channels of a region: those with which rounding to integers is expected to err least.

With factors m, activations of largest magnitude a and mean square q become m a and m^2 q, and a reader's weights W / m.
A uniform error of steps D has variance D^2 / 12 (Widrow), so output o of a reader errs by

    E_o = (max_k |W_ok / m_k| / 127)^2 / 12 * sum_k m_k^2 q_k  +  (max_k m_k a_k / 255)^2 / 12 * sum_k (W_ok / m_k)^2

as weights have a scale for each output and activations one for all channels. Candidates are

    m_k = w_k^(1 - t) / a_k^t        t = 1/4, 1/2, 3/4, 1

with w the largest weight that reads a channel: t = 1/2 balances both as in cross-layer equalization (Nagel et al. 2019,
arXiv:1906.04721) and SmoothQuant (Xiao et al. 2022, arXiv:2211.10438); t = 1 gives all channels one range, which costs
nothing before a depthwise convolution. They are taken where the sum of E, over the power of the outputs, gets less.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from fxcompress.passes.equalization.regions import Key, Region, Side
from torch import fx

from fxcompress.ir.ops import operation
from fxcompress.ir.weighted import weighted_layer

_STRENGTHS = (0.25, 0.5, 0.75, 1.0)
_WORTH = 0.95
_LEAST = 1e-6
"""A channel that is smaller than that beside the largest one is taken for dead."""


@dataclass(eq=False)
class Seen:
    """What was seen of the channels of a value, in float64.

    Attributes:
        largest: Largest magnitude.
        squares: Sum of squares.
        count: Elements of each channel.
    """

    largest: torch.Tensor
    squares: torch.Tensor
    count: int = 0

    @classmethod
    def nothing(cls, channels: int) -> Seen:
        return cls(torch.zeros(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64))

    def update(self, rows: torch.Tensor) -> None:
        """Takes ``(channels, elements)`` in."""
        rows = rows.detach().double().cpu()
        self.largest = torch.maximum(self.largest, rows.abs().amax(1))
        self.squares = self.squares + rows.square().sum(1)
        self.count += rows.shape[1]


@dataclass(frozen=True, eq=False)
class _Reader:
    """A reader's filters ``(groups, outputs, inputs, taps)``, and for each of its channels the number of its key."""

    filters: torch.Tensor
    places: torch.Tensor
    largest: torch.Tensor
    power: torch.Tensor

    def error(self, factors: torch.Tensor) -> float:
        """The share of the outputs' power that is lost to rounding, after dividing by some factors."""
        own = factors[self.places]
        scaled = self.filters / self._per_input(own)
        reach = scaled.abs().amax((2, 3)) / 127
        squares = (self._per_input(own.square() * self.power) * torch.ones_like(scaled)).sum((2, 3))
        step = float((own * self.largest).max()) / 255
        lost = (reach.square() * squares + step**2 * scaled.square().sum((2, 3))) / 12
        whole = (self.filters.square() * self._per_input(self.power)).sum()
        return float(lost.sum() / whole.clamp(min=torch.finfo(torch.float64).tiny))

    def weights(self, count: int) -> torch.Tensor:
        """For each key the largest weight that reads it, over the largest of its filter; 1 where filters read one."""
        found = torch.zeros(count, dtype=torch.float64)
        if self.filters.shape[2] == 1:
            return found
        rows = self.filters.abs().amax((2, 3), keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        shares = (self.filters.abs() / rows).amax((1, 3)).flatten()
        return found.scatter_reduce_(0, self.places, shares, "amax")

    def _per_input(self, vector: torch.Tensor) -> torch.Tensor:
        return vector.reshape(len(self.filters), 1, -1, 1)


def factors_of(root: fx.GraphModule, region: Region, seen: Mapping[fx.Node, Seen]) -> dict[Key, float] | None:
    """The factor of each key, ``None`` where none are expected to help."""
    keys = region.keys
    numbers = {key: number for number, key in enumerate(keys)}
    readers = [_reader(root, side, seen[side.value], numbers) for side in region.readers]
    wide = [reader for reader in readers if reader is not None]
    largest = torch.zeros(len(keys), dtype=torch.float64)
    for reader in wide:
        largest.scatter_reduce_(0, reader.places, reader.largest, "amax")
    weights = torch.stack([reader.weights(len(keys)) for reader in wide]).amax(0)
    if not bool(weights.any()):
        weights = torch.ones_like(weights)
    candidates = [_candidate(weights, largest, strength) for strength in _STRENGTHS]
    errors = [sum(reader.error(factors) for reader in wide) for factors in candidates]
    best = min(range(len(errors)), key=errors.__getitem__)
    if not errors[best] < _WORTH * sum(reader.error(torch.ones_like(largest)) for reader in wide):
        return None
    return dict(zip(keys, candidates[best].tolist(), strict=True))


def vector(side: Side, factors: Mapping[Key, float]) -> torch.Tensor:
    """The factor of each channel of a side."""
    return torch.tensor([factors[key] for key in side.keys], dtype=torch.float64)


def _reader(root: fx.GraphModule, side: Side, seen: Seen, numbers: Mapping[Key, int]) -> _Reader | None:
    call = operation(root, side.node)
    layer = weighted_layer(call) if call is not None else None
    if layer is None:
        return None
    filters = layer.layout.split(layer.operation["weight"].detach().double().cpu())
    places = torch.tensor([numbers[key] for key in side.keys])
    return _Reader(filters.flatten(3) if filters.dim() > 3 else filters[..., None], places, seen.largest,
                   seen.squares / max(seen.count, 1))  # fmt: skip


def _candidate(weights: torch.Tensor, largest: torch.Tensor, strength: float) -> torch.Tensor:
    """Factors that leave the range of all channels together as it is; 1 where nothing is read, or nothing was seen."""
    live = (largest > _LEAST * largest.max()) & (weights > 0)
    if not bool(live.any()):
        return torch.ones_like(largest)
    found = weights[live] ** (1 - strength) / largest[live] ** strength
    factors = torch.ones_like(largest)
    factors[live] = found * float(largest.max() / (found * largest[live]).max())
    return factors
