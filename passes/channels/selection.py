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

    def at_ratio(self, ratio: float) -> Mask:
        """The units to remove at a ratio, with one ``False`` more at the end."""
        return self._removed(self._ranking.counts(ratio))

    def _removed(self, counts: Array) -> Mask:
        """The units to remove where each candidate is to lose that many."""
        removed = self._report.removed_mask([])
        for candidate, order, count in zip(self._ranking.candidates, self._ranking.orders, counts, strict=True):
            removed[candidate.group.units[order[:count]]] = True
        self._align(removed)
        if self._refill(removed):
            self._align(removed)
        return removed

    def at_macs(self, price: Price, share: float) -> tuple[float, Mask]:
        """The least ratio that leaves no more than a share of the MACs, and the units to remove.

        Many groups may take their next step at one ratio; of these, the ones whose units count most do not take it
        where the share allows that.

        Raises:
            InputError: No ratio leaves so few.
        """
        most, least = share * price.whole, price.macs(self.at_ratio(1.0))
        if least > most:
            raise InputError(
                f"macs={share:g} cannot be reached: with as little of each group as is allowed, "
                f"{least / max(price.whole, 1):.1%} of the MACs stay; ask for more, or allow more "
                "(min-width, ignore, ratios)"
            )
        low, high = 0.0, 1.0
        for _ in range(_STEPS):
            middle = (low + high) / 2
            if price.macs(self.at_ratio(middle)) > most:
                low = middle
            else:
                high = middle
        return high, self._partway(price, most, self._ranking.counts(low), self._ranking.counts(high))

    def _partway(self, price: Price, most: float, fewer: Array, more: Array) -> Mask:
        """What to remove: from some groups as in ``fewer``, from the others as in ``more``, which leaves few enough."""
        stepping = np.flatnonzero(fewer != more).tolist()
        stepping.sort(key=lambda index: -self._ranking.score(index, int(fewer[index])))
        removed, fit, too_many = self._removed(more), 0, len(stepping)
        while too_many - fit > 1:
            kept = (fit + too_many) // 2
            counts = more.copy()
            counts[stepping[:kept]] = fewer[stepping[:kept]]
            tried = self._removed(counts)
            if price.macs(tried) > most:
                too_many = kept
            else:
                removed, fit = tried, kept
        return removed

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
