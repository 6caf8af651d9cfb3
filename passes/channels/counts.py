"""How many elements of each tensor's dims stay under a choice of units, for all tensors at once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from fxcompress.passes.channels.groups import ChannelReport
from fxcompress.passes.channels.layout import Dim
from fxcompress.passes.channels.units import Array, Mask


class Counts:
    """How many elements stay.

    Args:
        report: The channel dependencies.
    """

    def __init__(self, report: ChannelReport) -> None:
        self._elements = report.elements

    def kept(self, removed: Mask) -> Array:
        """For each array of elements how many stay."""
        return self._elements.counts(self._elements.stay(removed))

    def emptied(self, removed: Mask) -> Iterator[tuple[str, Array]]:
        """Each array of which nothing would stay: the value or state that has it, and its elements' units."""
        for place in np.flatnonzero(self.kept(removed) == 0).tolist():
            yield self._elements.names[place], self._elements.array(place)

    def shrunk(self, dim: Dim, size: int, kept: Array) -> int:
        """A concrete size of a dim after removal, given what :meth:`kept` says."""
        for factor in dim:
            if factor.units is not None:
                size = size // factor.size * int(kept[self._elements.place(factor)])
        return size


def counts_of(report: ChannelReport) -> Counts:
    """The counts of a report."""
    return Counts(report)
