"""From a ratio to the units to remove: aligned counts, and no tensor that ends up empty."""

from __future__ import annotations

import math

import numpy as np
from fxcompress.passes.channels.groups import ChannelGroup, ChannelReport
from fxcompress.passes.channels.price import Price
from fxcompress.passes.channels.ranking import Ranking
from fxcompress.passes.channels.units import NONE, Array, Mask

from fxcompress.errors import InputError

_FACTORS = ("outer", "inner", "whole")
_STEPS = 24


class Selection:
    """Chooses units by a ranking.

    Args:
        report: The channel dependencies.
        ranking: In which order units go.
        round_to: Dims are to keep multiples of this many elements.
    """

    def __init__(self, report: ChannelReport, ranking: Ranking, round_to: int) -> None:
        self._report = report
        self._ranking = ranking
        self._round_to = round_to
        self._steps: dict[int, int] = {}
        self._standing = np.zeros(report.units.count + 1)
        for candidate, order in zip(ranking.candidates, ranking.orders, strict=True):
            self._standing[candidate.group.units[order]] = np.linspace(0, 1, len(order))

    def removed(self, ratio: float) -> Mask:
        """The units to remove at a ratio, with one ``False`` more at the end."""
        removed = self._report.removed_mask([])
        counts = self._ranking.counts(ratio)
        for candidate, order, count in zip(self._ranking.candidates, self._ranking.orders, counts, strict=True):
            removed[candidate.group.units[order[:count]]] = True
        self._align(removed)
        if self._refill(removed):
            self._align(removed)
        return removed

    def ratio_for(self, price: Price, share: float) -> float:
        """The least ratio that leaves no more than a share of the MACs.

        Raises:
            InputError: No ratio leaves so few.
        """
        whole, least = price.whole, price.macs(self.removed(1.0))
        if least > share * whole:
            raise InputError(
                f"macs={share:g} cannot be reached: with as little of each group as is allowed, "
                f"{least / max(whole, 1):.1%} of the MACs stay; ask for more, or allow more (min-width, ignore, ratios)"
            )
        low, high = 0.0, 1.0
        for _ in range(_STEPS):
            middle = (low + high) / 2
            if price.macs(self.removed(middle)) > share * whole:
                low = middle
            else:
                high = middle
        return high

    def _align(self, removed: Mask) -> None:
        """Puts units back until the dims that they are in have rounded sizes: heads first, then their dims."""
        if self._round_to == 1:
            return
        ranked = sorted(
            zip(self._ranking.candidates, self._ranking.orders, strict=True),
            key=lambda pair: _FACTORS.index(pair[0].group.factor),
        )
        for candidate, order in ranked:
            units = candidate.group.units[order]
            gone = units[removed[units]]
            if len(gone):
                step = self._step(candidate.number, candidate.group, removed)
                kept = len(units) - len(gone)
                more = min(-kept % step, len(gone))
                removed[gone[len(gone) - more :]] = False

    def _step(self, number: int, group: ChannelGroup, removed: Mask) -> int:
        """Kept counts of a group that are multiples of this give its dims rounded sizes."""
        if number in self._steps:
            return self._steps[number]
        step, alone = 1, True
        for member in group.members:
            for factor in self._report.state[member.state][member.dim]:
                carried = self._report.resolved(factor)
                alone &= carried.shape[1] == 1
                step = math.lcm(step, self._round_to // math.gcd(self._round_to, _repeats(carried, group, removed)))
        if alone:
            self._steps[number] = step
        return step

    def _refill(self, removed: Mask) -> bool:
        """Puts the best units back where nothing of a dim would stay; whether there was such a dim."""
        refilled = False
        while True:
            emptied = list(self._report.survivors(removed).emptied())
            if not emptied:
                return refilled
            refilled = True
            for _, carried in emptied:
                gone = removed[carried]
                if gone.any(1).all():
                    standing = np.where(gone, self._standing[carried], 0).sum(1) / gone.sum(1)
                    best = np.lexsort((-standing, gone.sum(1)))[0]
                    removed[carried[best]] = False


def _repeats(carried: Array, group: ChannelGroup, removed: Mask) -> int:
    """How many of the elements that stay carry each unit of a group; a common divisor where that varies."""
    stays = carried[np.logical_not((removed[carried] & ~np.isin(carried, group.units)).any(1))]
    units = stays[np.isin(stays, group.units) & (stays != NONE)]
    _, repeats = np.unique(units, return_counts=True)
    return int(np.gcd.reduce(repeats)) if len(repeats) else 1
