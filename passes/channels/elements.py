"""The elements of all dims of a Program in one array, so that questions about all of them take one operation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
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
        held: The units of each element.
        carried: Those of them that can be removed.
        bounds: Where each array starts, and where the last one ends.
        names: For each array, what has it first.
    """

    def __init__(self, units: Units, layouts: Iterable[tuple[str, Layout]]) -> None:
        self._places: dict[Factor, int] = {}
        self.names: list[str] = []
        arrays: list[Array] = []
        numbers: dict[int, int] = {}
        for name, layout in layouts:
            for factor in (factor for dim in layout for factor in dim if factor not in self._places):
                if factor.units is not None:
                    if id(factor.units) not in numbers:
                        numbers[id(factor.units)] = len(numbers)
                        self.names.append(name)
                        arrays.append(factor.units)
                    self._places[factor] = numbers[id(factor.units)]
        self._count = units.count
        self.held = units.carried(joined(arrays))
        self.carried = units.removable(self.held)
        self.bounds = np.cumsum([0, *map(len, arrays)])
        self._compact: dict[int, Array] = {}

    def place(self, factor: Factor) -> int | None:
        """The number of a factor's array; ``None`` for a position, which has none."""
        return self._places.get(factor)

    def of(self, factor: Factor) -> Array:
        """The units that a factor's elements carry, in as few columns as they need."""
        return self.at(self._places[factor])

    def at(self, place: int) -> Array:
        """The units that the elements of an array carry, in as few columns as they need."""
        if place not in self._compact:
            self._compact[place] = compact(self.array(place))
        return self._compact[place]

    def array(self, place: int) -> Array:
        """The units that the elements of an array carry, with as many columns as the widest needs."""
        found: Array = self.carried[self.inside(place)]
        return found

    def inside(self, place: int) -> slice:
        """Where the elements of an array are."""
        return slice(self.bounds[place], self.bounds[place + 1])

    def holding(self, units: Array) -> set[int]:
        """The numbers of the arrays of which some element has any of these units, those that stay included."""
        wanted = np.zeros(self._count + 1, np.bool_)
        wanted[units] = True
        wanted[NONE] = False
        return set(np.flatnonzero(self.counts(np.any(wanted[self.held], 1))).tolist())

    def stay(self, removed: Mask) -> Mask:
        """For each element whether it stays."""
        goes = np.zeros(len(self.carried), np.bool_)
        for column in self.carried.T:  # rows are short, so columns are quicker
            goes |= removed[column]
        return np.logical_not(goes, out=goes)

    def counts(self, chosen: Mask) -> Array:
        """For each array how many of its elements are chosen."""
        before = np.concatenate([[0], np.cumsum(chosen)])
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
        self._kept: dict[Dim, torch.Tensor] = {}

    def emptied(self) -> Iterator[tuple[str, Array]]:
        """Each array of which nothing stays: the value or state that has it, and its elements' units."""
        for place, count in enumerate(self._counts):
            if count == 0:
                yield self._elements.names[place], self._elements.array(place)

    def size(self, factor: Factor) -> int:
        """How many elements of a factor stay."""
        place = self._elements.place(factor)
        return factor.size if place is None else self._counts[place]

    def factor(self, factor: Factor) -> Mask | None:
        """Which elements of a factor stay; ``None`` where all do."""
        place = self._elements.place(factor)
        if place is None or self._counts[place] == factor.size:
            return None
        found: Mask = self._stay[self._elements.inside(place)]
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

    def shrunk(self, size: Any, dim: Dim) -> Any:
        """The size of a dim after removal, where it was ``size``."""
        before, after = self.ratio(dim)
        return size if before == after else size // before * after

    def dim(self, dim: Dim) -> Mask | None:
        """Which elements of a dim stay, flat; ``None`` where all do."""
        if len(dim) == 1:
            return self.factor(dim[0])
        if not self.shrinks(dim):
            return None
        flat = np.ones(1, np.bool_)
        for factor in dim:
            mask = self.factor(factor)
            own = np.ones(factor.size, np.bool_) if mask is None else mask
            flat = (flat[:, None] & own[None, :]).reshape(-1)
        return flat

    def places(self, dim: Dim) -> torch.Tensor | None:
        """Where in a dim the elements are that stay; ``None`` where all do. The same tensor for the same dim."""
        if dim not in self._kept:
            mask = self.dim(dim)
            if mask is None:
                return None
            self._kept[dim] = torch.from_numpy(np.flatnonzero(mask))
        return self._kept[dim]
