"""The elements of all dims of a Program in one array, so that questions about all of them take one operation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from fxcompress.passes.channels.layout import Dim, Factor, Layout
from fxcompress.passes.channels.units import NONE, Array, Mask, Units, compact


def joined(arrays: Sequence[Array]) -> Array:
    """Arrays of elements, one after the other."""
    width = max((array.shape[1] for array in arrays), default=0)
    found: Array = np.full((sum(map(len, arrays)), width), NONE, order="F")
    place = 0
    for array in arrays:
        found[place : place + len(array), : array.shape[1]] = array
        place += len(array)
    return found


class Elements:
    """Every distinct array of elements in some layouts, one after the other.

    Args:
        units: The units that they carry, after the last equation.
        layouts: Layouts by the name of what has them.

    Attributes:
        carried: The units of each element.
        bounds: Where each array starts, and where the last one ends.
        names: For each array, what has it first.
    """

    def __init__(self, units: Units, layouts: Iterable[tuple[str, Layout]]) -> None:
        self._place: dict[int, int] = {}
        self.names: list[str] = []
        self._arrays: list[Array] = []
        for name, layout in layouts:
            for dim in layout:
                for factor in dim:
                    if factor.units is not None and id(factor.units) not in self._place:
                        self._place[id(factor.units)] = len(self._arrays)
                        self._arrays.append(factor.units)
                        self.names.append(name)
        self.carried = units.resolve(joined(self._arrays))
        self.bounds = np.cumsum([0, *map(len, self._arrays)])

    def place(self, factor: Factor) -> int:
        """The number of a factor's array."""
        return self._place[id(factor.units)]

    def of(self, factor: Factor) -> Array:
        """The units that a factor's elements carry."""
        return compact(self.array(self.place(factor)))

    def array(self, place: int) -> Array:
        """The units that the elements of an array carry, with as many columns as the widest needs."""
        found: Array = self.carried[self.bounds[place] : self.bounds[place + 1]]
        return found

    def stay(self, removed: Mask) -> Mask:
        """For each element whether it stays."""
        goes = np.zeros(len(self.carried), np.bool_)
        for column in self.carried.T:  # rows are short, so columns are quicker
            goes |= removed[column]
        return np.logical_not(goes, out=goes)

    def counts(self, stay: Mask) -> Array:
        """For each array how many of its elements stay."""
        before = np.concatenate([[0], np.cumsum(stay)])
        found: Array = before[self.bounds[1:]] - before[self.bounds[:-1]]
        return found


class Survivors:
    """What stays of each dim when some units go.

    Args:
        elements: The elements of all dims.
        removed: For each unit whether it goes, with one ``False`` more at the end.
    """

    def __init__(self, elements: Elements, removed: Mask) -> None:
        self._elements = elements
        self._stay = elements.stay(removed)
        self._counts = elements.counts(self._stay).tolist()

    def size(self, factor: Factor) -> int:
        """How many elements of a factor stay."""
        return factor.size if factor.units is None else self._counts[self._elements.place(factor)]

    def factor(self, factor: Factor) -> Mask | None:
        """Which elements of a factor stay; ``None`` where all do."""
        if self.size(factor) == factor.size:
            return None
        place, bounds = self._elements.place(factor), self._elements.bounds
        found: Mask = self._stay[bounds[place] : bounds[place + 1]]
        return found

    def shrinks(self, *dims: Dim) -> bool:
        """Whether any element of any of these dims goes."""
        return any(self.size(factor) != factor.size for dim in dims for factor in dim)

    def ratio(self, dim: Dim) -> tuple[int, int]:
        """Sizes before and after of the factors of a dim that shrink."""
        before = after = 1
        for factor in dim:
            size = self.size(factor)
            if size != factor.size:
                before, after = before * factor.size, after * size
        return before, after

    def dim(self, dim: Dim) -> Mask | None:
        """Which elements of a dim stay, flat; ``None`` where all do."""
        if not self.shrinks(dim):
            return None
        flat = np.ones(1, np.bool_)
        for factor in dim:
            mask = self.factor(factor)
            own = np.ones(factor.size, np.bool_) if mask is None else mask
            flat = (flat[:, None] & own[None, :]).reshape(-1)
        return flat
