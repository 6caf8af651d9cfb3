"""Ridge regression of filters from sums over places, with the penalty chosen by cross-validation.

For each group, with filters W, inputs x and wanted outputs y (less their means, where a shift can take those up), the
new filters are W + D where D minimises

    sum |y - (W + D) x|^2  +  penalty * mean_j(G_jj) * |D|^2,    G = sum x x^T

so what the data do not determine stays as it is. The penalty is the one whose filters, fitted on one half of the data,
do best on the other half; where none does better than W, that stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

PENALTIES = (10.0, 1.0, 0.1, 1e-2, 1e-3, 1e-4)
"""Penalties to choose from, strongest first."""

_CHUNK = 8192
_LEAST = 1e-12


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over places, in float64, by group.

    Attributes:
        count: Number of places.
        x: Sum of inputs, ``(groups, inputs)``.
        y: Sum of outputs, ``(groups, outputs)``.
        xx: Sum of products of inputs, ``(groups, inputs, inputs)``.
        xy: Sum of products of inputs and outputs, ``(groups, inputs, outputs)``.
        yy: Sum of squared outputs, ``(groups, outputs)``.
    """

    count: int
    x: torch.Tensor
    y: torch.Tensor
    xx: torch.Tensor
    xy: torch.Tensor
    yy: torch.Tensor

    @classmethod
    def zero(cls, weight: torch.Tensor) -> Moments:
        """Of no place, for filters ``(groups, inputs, outputs)``."""
        groups, inputs, outputs = weight.shape
        shapes = (inputs,), (outputs,), (inputs, inputs), (inputs, outputs), (outputs,)
        return cls(0, *(weight.new_zeros(groups, *shape) for shape in shapes))

    def add(self, x: torch.Tensor, y: torch.Tensor) -> Moments:
        """With the places of ``x`` ``(places, groups, inputs)`` and ``y`` ``(places, groups, outputs)``."""
        total = self
        for some_x, some_y in zip(torch.split(x, _CHUNK), torch.split(y, _CHUNK), strict=True):
            if len(some_x):
                total = total + _moments(some_x.transpose(0, 1), some_y.transpose(0, 1))
        return total

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.count + other.count, self.x + other.x, self.y + other.y, self.xx + other.xx, self.xy + other.xy,
            self.yy + other.yy,
        )  # fmt: skip

    @property
    def finite(self) -> bool:
        """Whether no input or output was NaN or infinite, or too large to square."""
        return all(bool(torch.isfinite(part).all()) for part in (self.xx, self.xy, self.yy))

    def centred(self) -> Moments:
        """The sums of the same places less their means."""
        n = max(self.count, 1)
        return Moments(
            self.count, torch.zeros_like(self.x), torch.zeros_like(self.y),
            self.xx - self.x[:, :, None] * self.x[:, None, :] / n,
            self.xy - self.x[:, :, None] * self.y[:, None, :] / n,
            self.yy - self.y.square() / n,
        )  # fmt: skip

    def mean_error(self, weight: torch.Tensor) -> torch.Tensor:
        """How much the outputs of filters are too small in the mean, ``(groups, outputs)``."""
        return (self.y - (self.x[:, None, :] @ weight)[:, 0]) / max(self.count, 1)

    def error(self, weight: torch.Tensor) -> float:
        """Sum of squared errors of filters ``(groups, inputs, outputs)``."""
        return float((weight * (self.xx @ weight - 2 * self.xy)).sum() + self.yy.sum())


def _moments(x: torch.Tensor, y: torch.Tensor) -> Moments:
    count = x.shape[1]
    x_mean, y_mean = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
    x, y = x - x_mean, y - y_mean  # products of deviations lose less in single precision
    x_mean, y_mean = x_mean.double(), y_mean.double()
    return Moments(
        count,
        count * x_mean[:, 0],
        count * y_mean[:, 0],
        (x.mT @ x).double() + count * x_mean.mT @ x_mean,
        (x.mT @ y).double() + count * x_mean.mT @ y_mean,
        y.double().square().sum(1) + count * y_mean[:, 0].square(),
    )


@dataclass(frozen=True, eq=False)
class Fit:
    """New filters.

    Attributes:
        weight: ``(groups, inputs, outputs)``.
        shift: ``(groups, outputs)`` to add to the outputs; zeros where nothing takes a shift up.
        before: Squared error of the old filters, relative to the outputs.
        after: That of the new filters and shift, on the halves that they were not fitted on.
    """

    weight: torch.Tensor
    shift: torch.Tensor
    before: float
    after: float


def fit(halves: tuple[Moments, Moments], weight: torch.Tensor, *, shifted: bool, penalty: float | None) -> Fit:
    """Fits filters.

    Args:
        halves: Sums over the two halves of the data.
        weight: The old filters, ``(groups, inputs, outputs)``.
        shifted: Whether a shift of the outputs can be taken up.
        penalty: The penalty; ``None`` to choose it.
    """
    total = halves[0] + halves[1]
    first, second = (half.centred() if shifted else half for half in halves)

    def error(penalty: float) -> float:
        return second.error(solve(first, weight, penalty)) + first.error(solve(second, weight, penalty))

    chosen = _best(error) if penalty is None else penalty
    new = solve(total.centred() if shifted else total, weight, chosen)
    shift = torch.zeros_like(total.y)
    if shifted:
        shift = total.mean_error(new)
    power = max(float(total.yy.sum()), torch.finfo(torch.float64).tiny)
    return Fit(new, shift, total.error(weight) / power, error(chosen) / power)


def _best(error: Callable[[float], float]) -> float:
    """Weakens the penalty as long as that helps."""
    chosen, least = math.inf, error(math.inf)
    for penalty in PENALTIES:
        found = error(penalty)
        if found >= least:
            break
        chosen, least = penalty, found
    return chosen


def solve(moments: Moments, weight: torch.Tensor, penalty: float) -> torch.Tensor:
    """The filters that are best on those places, for a penalty."""
    if math.isinf(penalty):
        return weight
    scale = torch.diagonal(moments.xx, dim1=1, dim2=2).mean(1, keepdim=True)
    strength = (penalty + _LEAST) * scale + torch.finfo(torch.float64).tiny
    factor = torch.linalg.cholesky(moments.xx + torch.diag_embed(strength.expand(weight.shape[:2])))
    return weight + torch.cholesky_solve(moments.xy - moments.xx @ weight, factor)
