"""How many elements of each tensor's dims stay under a choice of units, for all tensors at once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from weakref import WeakKeyDictionary

import numpy as np
from fxcompress.passes.channels.groups import ChannelReport
from fxcompress.passes.channels.layout import Dim
from fxcompress.passes.channels.units import NONE, Array, Mask


def joined(arrays: Sequence[Array]) -> Array:
    """Arrays of elements, one after the other."""
    width = max((array.shape[1] for array in arrays), default=0)
    found: Array = np.full((sum(map(len, arrays)), width), NONE)
    place = 0
    for array in arrays:
        found[place : place + len(array), : array.shape[1]] = array
        place += len(array)
    return found


class Counts:
    """Every distinct array of elements in the layouts of values and state, one after the other.

    Args:
        report: The channel dependencies.
    """

    def __init__(self, report: ChannelReport) -> None:
        self._place: dict[int, int] = {}
        self._names: list[str] = []
        arrays: list[Array] = []
        for name, dim in _dims(report):
            for factor in dim:
                if factor.units is not None and id(factor.units) not in self._place:
                    self._place[id(factor.units)] = len(arrays)
                    arrays.append(factor.units)
                    self._names.append(name)
        self._carried = report.units.resolve(joined(arrays))
        self._bounds = np.cumsum([0, *map(len, arrays)])

    def kept(self, removed: Mask) -> Array:
        """For each array how many of its elements stay."""
        if not len(self._carried):
            return np.empty(0, np.int64)
        stays = np.logical_not(removed[self._carried].any(axis=1))
        found: Array = np.add.reduceat(stays, self._bounds[:-1], dtype=np.int64)
        return found

    def emptied(self, removed: Mask) -> Iterator[tuple[str, Array]]:
        """Each array of which nothing would stay: the value or state that has it, and its elements' units."""
        for place in np.flatnonzero(self.kept(removed) == 0):
            yield self._names[place], self._carried[self._bounds[place] : self._bounds[place + 1]]

    def shrunk(self, dim: Dim, size: int, kept: Array) -> int:
        """A concrete size of a dim after removal, given what :meth:`kept` says."""
        for factor in dim:
            if factor.units is not None:
                size = size // factor.size * int(kept[self._place[id(factor.units)]])
        return size


_KNOWN: WeakKeyDictionary[ChannelReport, Counts] = WeakKeyDictionary()


def counts_of(report: ChannelReport) -> Counts:
    """The counts of a report, made once."""
    if report not in _KNOWN:
        _KNOWN[report] = Counts(report)
    return _KNOWN[report]


def _dims(report: ChannelReport) -> Iterator[tuple[str, Dim]]:
    for name, layout in itertools.chain(report.state.items(), report.layouts.items()):
        for each in layout if isinstance(layout, list) else [layout]:
            yield from ((name, dim) for dim in each)
