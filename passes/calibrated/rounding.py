"""Rounding of filters to a grid so that their outputs err least, from the second moments of their inputs.

With filters W and inputs x, both by group, the error of the outputs is quadratic in D = rounded(W) - W:

    tr(D^T S D),    S = sum (x - mean x)(x - mean x)^T + penalty * mean_j(S_jj) * I

First one input after the other is rounded, and what that costs is made up by those that are still to come, as far as
they can in closed form ("GPTQ", Frantar et al. 2023, arXiv:2210.17323). Then coordinate descent moves single weights as
long as that lowers the error ("QuantEase", Behdin et al. 2023, arXiv:2309.01885). Each weight ends at one of the two
grid points around it ("AdaRound", Nagel et al. 2020, arXiv:2004.10568).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

_BLOCK = 128
_REACH = 0.45


@dataclass(frozen=True, eq=False)
class WeightGrid:
    """The grid of a weight: the integers from ``quant_min`` to ``quant_max`` times a scale.

    Attributes:
        scale: Distance of neighbours, in the shape of the weight or one that broadcasts to it.
        quant_min: Least integer.
        quant_max: Largest integer.
    """

    scale: torch.Tensor
    quant_min: int
    quant_max: int

    def around(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The grid points below and above each weight; one beyond the ends has the end for both."""
        steps = weight / self.scale
        low, high = (end.clamp(self.quant_min, self.quant_max) * self.scale for end in (steps.floor(), steps.ceil()))
        return low, high

    def nearest(self, weight: torch.Tensor) -> torch.Tensor:
        """The grid point nearest to each weight."""
        return (weight / self.scale).round().clamp(self.quant_min, self.quant_max) * self.scale

    def rounding_to(self, chosen: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The weights whose nearest grid points are ``chosen``: ``weight`` where that is so, else near it."""
        reach = _REACH * self.scale
        moved = torch.minimum(torch.maximum(weight, chosen - reach), chosen + reach)
        return torch.where((self.nearest(weight) - chosen).abs() < reach, weight, moved)


def error(difference: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The squared error of each output, ``(groups, outputs)``, for D of ``(groups, inputs, outputs)``."""
    return (difference * (second @ difference)).sum(1)


def regular(second: torch.Tensor, penalty: float) -> torch.Tensor:
    """S with a penalty, ``(groups, inputs, inputs)``: what the data do not determine stays near the nearest points."""
    power = torch.diagonal(second, dim1=1, dim2=2).mean(1, keepdim=True)
    strength = penalty * power + torch.finfo(torch.float32).tiny
    return second + torch.diag_embed(strength.expand(second.shape[:2]))


def refined(weight: torch.Tensor, second: torch.Tensor, grid: WeightGrid, sweeps: int) -> torch.Tensor:
    """Filters on the grid that err no more than those at the nearest points do.

    Args:
        weight: The filters, ``(groups, inputs, outputs)``.
        second: S, ``(groups, inputs, inputs)``, positive definite.
        grid: Their grid.
        sweeps: How often coordinate descent looks at each weight, at most.
    """
    low, high = grid.around(weight)
    found, nearest = _made_up(weight, second, low, high), grid.nearest(weight)
    worse = error(found - weight, second) > error(nearest - weight, second)
    found = torch.where(worse[:, None], nearest, found)
    for _ in range(sweeps):
        before = found
        found = _descended(weight, second, low, high, found)
        if torch.equal(found, before):
            break
    return found


def _made_up(weight: torch.Tensor, second: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Rounds one input after the other, those of most power first, and makes up for it with those to come."""
    order = torch.diagonal(second.sum(0)).argsort(descending=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(second[:, order][:, :, order]))
    factor = torch.linalg.cholesky(inverse, upper=True)
    left, low, high = (tensor[:, order] for tensor in (weight, low, high))
    for block in _blocks(left.shape[1]):
        costs = torch.zeros_like(left[:, block])
        for row, place in enumerate(range(block.start, block.stop)):
            wanted, rest = left[:, place], slice(place + 1, block.stop)
            chosen = _nearer(wanted, low[:, place], high[:, place])
            costs[:, row] = (wanted - chosen) / factor[:, place, place, None]
            left[:, rest] -= factor[:, place, rest, None] * costs[:, None, row]
            left[:, place] = chosen
        left[:, block.stop :] -= factor[:, block, block.stop :].mT @ costs
    return left[:, order.argsort()]


def _descended(
    weight: torch.Tensor, second: torch.Tensor, low: torch.Tensor, high: torch.Tensor, found: torch.Tensor
) -> torch.Tensor:
    """One sweep of coordinate descent."""
    found = found.clone()
    gradient, power = second @ (found - weight), torch.diagonal(second, dim1=1, dim2=2)
    for block in _blocks(found.shape[1]):
        before, own = found[:, block].clone(), gradient[:, block].clone()
        for row, place in enumerate(range(block.start, block.stop)):
            best = found[:, place] - own[:, row] / power[:, place, None]
            chosen = _nearer(best, low[:, place], high[:, place])
            own += second[:, block, place, None] * (chosen - found[:, place])[:, None]
            found[:, place] = chosen
        gradient += second[:, :, block] @ (found[:, block] - before)
    return found


def _blocks(count: int) -> Iterator[slice]:
    """Inputs that are looked at one by one before the others hear of it, so that most of the work is products."""
    for start in range(0, count, _BLOCK):
        yield slice(start, min(start + _BLOCK, count))


def _nearer(wanted: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    return torch.where(wanted < (low + high) / 2, low, high)
