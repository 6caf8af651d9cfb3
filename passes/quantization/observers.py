"""Observers: which range of a tensor's values integers should cover.

One registry, by name. An observer sees the tensor of each calibration batch once and holds memory of a fixed size. One
of your own takes a few lines:

    @observer("half")
    class Half(MinMax):
        def range(self, grid: Grid) -> Range:
            found = super().range(grid)
            return Range(found.low / 2, found.high / 2)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar

import torch
from fxcompress.passes.quantization.grid import Grid, Range

from fxcompress.errors import InputError, did_you_mean

_BINS = 8192
_MOMENTUM = 0.1
_PERCENTILE = 99.99
_STEPS = 64


class Observer(ABC):
    """Gathers what is needed of one tensor."""

    @abstractmethod
    def update(self, x: torch.Tensor) -> None:
        """Takes the finite values of one batch in."""

    @abstractmethod
    def range(self, grid: Grid) -> Range:
        """The range that a grid should cover."""


_OBSERVERS: dict[str, type[Observer]] = {}

ObserverClass = TypeVar("ObserverClass", bound=type[Observer])


def observer(name: str) -> Callable[[ObserverClass], ObserverClass]:
    """Registers an observer.

    Raises:
        InputError: The name is taken.
    """

    def register(cls: ObserverClass) -> ObserverClass:
        if name in _OBSERVERS:
            raise InputError(f"the observer {name!r} is defined twice: {_OBSERVERS[name].__qualname__}")
        _OBSERVERS[name] = cls
        return cls

    return register


def observer_of(name: str) -> type[Observer]:
    """The observer of that name.

    Raises:
        InputError: There is none; near names are given.
    """
    if name not in _OBSERVERS:
        near = did_you_mean(name, _OBSERVERS) or f"; observers: {', '.join(sorted(_OBSERVERS))}"
        raise InputError(f"there is no observer {name!r}{near}")
    return _OBSERVERS[name]


@observer("minmax")
class MinMax(Observer):
    """Everything that was seen."""

    def __init__(self) -> None:
        self._low, self._high = math.inf, -math.inf

    def update(self, x: torch.Tensor) -> None:
        low, high = x.aminmax()
        self._low, self._high = min(self._low, low.item()), max(self._high, high.item())

    def range(self, grid: Grid) -> Range:
        return Range(self._low, self._high)


@observer("moving-average")
class MovingAverage(Observer):
    """Exponential moving averages of the ends of each batch (Jacob et al. 2018, arXiv:1712.05877, section 3.1)."""

    def __init__(self) -> None:
        self._ends: tuple[float, float] | None = None

    def update(self, x: torch.Tensor) -> None:
        low, high = (end.item() for end in x.aminmax())
        before = self._ends or (low, high)
        self._ends = before[0] + _MOMENTUM * (low - before[0]), before[1] + _MOMENTUM * (high - before[1])

    def range(self, grid: Grid) -> Range:
        assert self._ends is not None
        return Range(*self._ends)


class Histogram(MinMax):
    """Base of observers that look at how often values occur.

    Bins lie evenly in ``[-limit, limit]``. The limit is a power of two that doubles when a batch exceeds it; each two
    bins then become one, so that what was counted stays exact.
    """

    def __init__(self) -> None:
        super().__init__()
        self._limit = 0.0
        self._counts = torch.zeros(_BINS, dtype=torch.float64)

    def update(self, x: torch.Tensor) -> None:
        super().update(x)
        largest = max(-self._low, self._high)
        if largest == 0:
            return
        if self._limit == 0:
            self._limit = _power_above(largest)
        while self._limit < largest:
            merged = self._counts.reshape(-1, 2).sum(1)
            self._counts = torch.nn.functional.pad(merged, (_BINS // 4, _BINS // 4))
            self._limit *= 2
        self._counts += torch.histc(x.float(), _BINS, -self._limit, self._limit).cpu()

    def _seen(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Centres of the bins between the least and the largest value, and their counts."""
        centres = (torch.arange(_BINS, dtype=torch.float64) + 0.5) * (2 * self._limit / _BINS) - self._limit
        width = 2 * self._limit / _BINS
        inside = (centres > self._low - width) & (centres < self._high + width)
        return centres[inside], self._counts[inside]

    def range(self, grid: Grid) -> Range:
        everything = super().range(grid)
        return self._chosen(everything.united(Range(0.0, 0.0)), grid) if self._limit > 0 else everything

    @abstractmethod
    def _chosen(self, everything: Range, grid: Grid) -> Range:
        """The range, where there is any value but 0; ``everything`` holds 0 as grids do."""


def _power_above(value: float) -> float:
    return 2.0 ** math.ceil(math.log2(value))


@observer("percentile")
class Percentile(Histogram):
    """All but the outermost values, 0.01 % in all (Wu et al. 2020, arXiv:2004.09602)."""

    def _chosen(self, everything: Range, grid: Grid) -> Range:
        centres, counts = self._seen()
        share = counts.cumsum(0) / counts.sum()
        tail = (1 - _PERCENTILE / 100) / 2
        inside = centres[(share > tail) & (share - counts / counts.sum() < 1 - tail)]
        return Range(max(everything.low, inside[0].item()), min(everything.high, inside[-1].item()))


@observer("mse")
class MeanSquaredError(Histogram):
    """The range whose grid gives the least mean squared error on what was seen; each end is searched for in turn."""

    def _chosen(self, everything: Range, grid: Grid) -> Range:
        centres, counts = self._seen()
        shares = torch.linspace(1 / _STEPS, 1, _STEPS, dtype=torch.float64).tolist()

        def best(candidates: list[Range]) -> Range:
            return min(candidates, key=lambda found: _error(found, grid, centres, counts))

        found = best([Range(everything.low * share, everything.high * share) for share in shares])
        for _ in range(2):
            found = best([Range(found.low, everything.high * share) for share in shares])
            found = best([Range(everything.low * share, found.high) for share in shares])
        return found


def _error(found: Range, grid: Grid, values: torch.Tensor, counts: torch.Tensor) -> float:
    rounded = grid.parameters(found).rounded(values)
    return float(((rounded - values).square() * counts).sum())


@observer("entropy")
class Entropy(Histogram):
    """The range whose grid keeps the most of the distribution: least Kullback-Leibler divergence (Migacz 2017).

    As in "8-bit inference with TensorRT", the distribution with its tails moved to the ends is compared with what is
    left of it when the bins of each step are spread evenly over those that are not empty. Zeros, which activations
    give so many of and every grid holds exactly, do not count: to keep them, everything else would be cut off.
    """

    def update(self, x: torch.Tensor) -> None:
        others = x[x != 0]
        super().update(others if others.numel() else x)

    def _chosen(self, everything: Range, grid: Grid) -> Range:
        centres, counts = self._seen()
        shares = torch.linspace(1 / _STEPS, 1, _STEPS, dtype=torch.float64).tolist()
        candidates = [Range(everything.low * share, everything.high * share) for share in shares]
        return min(candidates, key=lambda found: _divergence(found, grid, centres, counts))


def _divergence(found: Range, grid: Grid, values: torch.Tensor, counts: torch.Tensor) -> float:
    half = float(values[1] - values[0]) / 2
    inside = (values >= found.low - half) & (values <= found.high + half)
    if not bool((counts * inside).any()):
        return math.inf
    kept = counts[inside]
    reference = kept.clone()
    reference[0] += counts[values < found.low].sum()
    reference[-1] += counts[values > found.high].sum()
    steps = grid.parameters(found).integers(values[inside]).long()
    steps -= int(steps.min())
    filled = (reference > 0).double()
    size = int(steps.max()) + 1
    mass = torch.zeros(size, dtype=torch.float64).index_add_(0, steps, kept)
    places = torch.zeros(size, dtype=torch.float64).index_add_(0, steps, filled)
    spread = filled * (mass / places.clamp(min=1))[steps]
    p, q = reference / reference.sum(), spread / spread.sum().clamp(min=1e-300)
    present = p > 0
    return float((p[present] * (p[present] / q[present].clamp(min=1e-12)).log()).sum())
