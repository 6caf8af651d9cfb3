"""Measured latency: what is compared runs in turns, so that a machine that slows down slows all of it alike."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from fxcompress.errors import InputError

ROUNDS = 25
BUDGET_S = 20.0

_LEAST_ROUNDS = 5
_LEAST_SAMPLE_S = 5e-3
"""A sample shorter than this repeats the call: a timer and a cold cache would be measured otherwise."""

_REST_S = 0.1
"""Before each sample, so that threads of the engine before it have stopped to wait actively for more work.

Those of onnxruntime do so for more than 30 ms: after a rest of 10 ms a call of any engine took one of two times, a half
apart.
"""


@dataclass(frozen=True)
class Latency:
    """Seconds per call, one sample per round.

    Attributes:
        samples: Mean seconds per call in each round; rounds of different candidates belong together.
        calls: Calls per sample.
    """

    samples: tuple[float, ...] = field(repr=False)
    calls: int

    @property
    def median(self) -> float:
        """Median seconds per call."""
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Interquartile range, relative to the median."""
        if len(self.samples) < 2:
            return 0.0
        lower, _, upper = statistics.quantiles(self.samples, n=4, method="inclusive")
        return (upper - lower) / self.median

    def speedup_over(self, other: Latency) -> float:
        """How many times faster than ``other``: median over rounds of the ratio within one round."""
        return statistics.median(a / b for a, b in zip(other.samples, self.samples, strict=True))

    def __str__(self) -> str:
        return f"{self.median * 1e3:.3g} ms ± {self.spread / 2:.0%}"


def measure(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int = ROUNDS,
    budget: float = BUDGET_S,
    on_round: Callable[[int, int], None] | None = None,
) -> dict[str, Latency]:
    """Latency of several calls, measured in interleaved rounds without gradients.

    Each round takes one sample of every call, in an order of its own, so that none always follows the same other one.

    Args:
        calls: Name -> what to time.
        rounds: Rounds at most.
        budget: Seconds after which no further round starts; five rounds are always made.
        on_round: Called with the rounds done and the rounds planned.

    Raises:
        InputError: If there is nothing to measure, or ``rounds`` is less than 1.
    """
    if not calls or rounds < 1:
        raise InputError(f"nothing to measure: {len(calls)} calls, {rounds} rounds; give at least one of each")
    with torch.no_grad():
        repeats = {name: _repeats(call) for name, call in calls.items()}
        samples: dict[str, list[float]] = {name: [] for name in calls}
        order = random.Random(0)
        started = time.perf_counter()
        for index in range(rounds):
            if index >= _LEAST_ROUNDS and time.perf_counter() - started > budget:
                break
            for name in order.sample(list(calls), len(calls)):
                samples[name].append(_sample(calls[name], repeats[name]))
            if on_round is not None:
                on_round(index + 1, rounds)
    return {name: Latency(tuple(times), repeats[name]) for name, times in samples.items()}


def _repeats(call: Callable[[], object]) -> int:
    """Warms up, and finds how often the call fits into the least sample."""
    _sample(call, 2)
    quickest = min(_sample(call, 1) for _ in range(3))
    return max(1, math.ceil(_LEAST_SAMPLE_S / max(quickest, 1e-9)))


def _sample(call: Callable[[], object], repeats: int) -> float:
    _synchronize()
    time.sleep(_REST_S)
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    _synchronize()
    return (time.perf_counter() - started) / repeats


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
