"""Rankings: in which order the units of groups go, and how many of each group at a ratio."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import numpy as np
from fxcompress.passes.channels.criteria.totals import Scores
from fxcompress.passes.channels.groups import ChannelGroup
from fxcompress.passes.channels.units import Array


@dataclass(frozen=True, eq=False)
class Candidate:
    """A group that something may be removed from.

    Attributes:
        number: Its number in the report.
        group: The group.
        scores: Importance of its units, comparable within the pool.
        pool: Groups of one pool are ranked together.
        ratio: The share to remove that a pattern sets, ``None`` for that of all others.
        least: How many units stay at least.
        pattern: The pattern, if any.
    """

    number: int
    group: ChannelGroup
    scores: Scores
    pool: Hashable
    ratio: float | None
    least: int
    pattern: str | None


class Ranking:
    """The units of some groups, least important first.

    Attributes:
        candidates: The groups.
        orders: For each, the places of its units, least important first.
    """

    def __init__(self, candidates: Iterable[Candidate]) -> None:
        self.candidates = tuple(candidates)
        self.orders = [np.argsort(each.scores, kind="stable") for each in self.candidates]
        pools: dict[Hashable, list[int]] = defaultdict(list)
        for index, each in enumerate(self.candidates):
            pools[each.pool, each.ratio].append(index)
        self._pools = [_Pool(self, members) for members in pools.values()]

    def counts(self, ratio: float) -> Array:
        """For each candidate how many of its units go, where no pattern says otherwise, at a ratio."""
        counts = np.zeros(len(self.candidates), np.int64)
        for pool in self._pools:
            pool.take(ratio, counts)
        return counts

    def score(self, index: int, place: int) -> float:
        """The importance of a candidate's unit at a place of its order."""
        return float(self.candidates[index].scores[self.orders[index][place]])


class _Pool:
    """Groups whose units are ranked together; each keeps its least number."""

    def __init__(self, ranking: Ranking, members: list[int]) -> None:
        chosen = [ranking.candidates[index] for index in members]
        free = [max(len(each.group) - each.least, 0) for each in chosen]
        ascending = [each.scores[ranking.orders[i]][:n] for each, i, n in zip(chosen, members, free, strict=True)]
        self._ratio = chosen[0].ratio
        self._units = sum(len(each.group) for each in chosen)
        self._owner = np.repeat(members, free)[np.argsort(np.concatenate(ascending), kind="stable")]

    def take(self, ratio: float, counts: Array) -> None:
        share = ratio if self._ratio is None else self._ratio
        wanted = int(share * self._units + 1e-9)  # 0.29 of 100 is 29, though the product of floats is less
        counts += np.bincount(self._owner[:wanted], minlength=len(counts))
