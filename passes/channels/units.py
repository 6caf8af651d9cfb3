"""Units: what can be removed, the equalities between them, and the products they turn out to be.

A unit is the smallest thing that can be removed. An *element* (one index of one dim of one tensor) carries a set of
units and disappears when any of them is removed. An array of ``n`` elements is an ``(n, k)`` int64 array: row ``i`` has
the units of element ``i``, in up to ``k`` columns, outer factors first, ``NONE`` where there are fewer. An element
without units stays.

Operators only state that two arrays disappear together (:meth:`Units.join`). Such an equation between sets of units is
solved by substitution. Where both sides have one unit a row, the two are merged in a union-find. Otherwise, every pair
of columns that occur together has a common factor: the connected components of its co-occurrence. Each unit is replaced
everywhere by the set of its components, so both sides become the same set. That one rule turns the channels of a
projection into heads x head dims, and the channels of a grouped convolution into groups x channels in a group.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Array = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

NONE = -1
"""Fills the columns of elements that carry fewer units than others."""

_FREE = -1
_WHOLE = -1


class Units:
    """A growing population of units under equations.

    Units are never forgotten: ``resolve`` says what an array's units have become since it was made.
    """

    def __init__(self) -> None:
        self.count = 0
        # The last entry of each table is that of NONE: its own root, never free.
        self._parent = np.array([NONE])
        self._frozen_by = np.array([0])
        self._parts_row = np.array([_WHOLE])
        self._single = np.array([False])  # whether a root is free and whole
        self._parts = np.empty((0, 2), np.int64)
        self._divided = 0
        self._known_single: Array | None = None  # until an equation changes what arrays carry

    def fresh(self, count: int) -> Array:
        """An array of ``count`` elements with one new unit each."""
        first, self.count = self.count, self.count + count
        if self.count >= len(self._parent):
            self._grow(2 * self.count + 1024)
        return np.arange(first, self.count).reshape(-1, 1)

    def _grow(self, count: int) -> None:
        def longer(table: Any, new: Any) -> Any:
            return np.concatenate([table[:-1], new, table[-1:]])

        known = len(self._parent) - 1
        self._parent = longer(self._parent, np.arange(known, count))
        self._frozen_by = longer(self._frozen_by, np.full(count - known, _FREE))
        self._parts_row = longer(self._parts_row, np.full(count - known, _WHOLE))
        self._single = longer(self._single, np.full(count - known, True))

    def freeze(self, array: Array, cause: int) -> None:
        """Keeps elements for good; ``cause`` is any number >= 0 that says why, the first given is kept."""
        roots = self._expand(array)
        self._frozen_by[roots[self._frozen_by[roots] == _FREE]] = cause
        self._single[roots] = False
        self._known_single = None

    def cause(self, array: Array) -> Array:
        """For each element the cause that froze one of its units, -1 where none did."""
        roots = self._expand(array)
        found: Array = np.where(roots == NONE, _FREE, self._frozen_by[roots]).max(axis=1, initial=_FREE)
        return found

    def carried(self, array: Array) -> Array:
        """What the elements carry by now, those that stay for good included."""
        return _distinct(self._expand(array))

    def are_single(self, array: Array) -> bool:
        """Whether each element carries one unit that can be removed."""
        if array is self._known_single:
            return True
        found = array.shape[1] == 1 and bool(self._single[self._roots(array)].all())
        if found:
            self._known_single = array
        return found

    def removable(self, carried: Array) -> Array:
        """What the elements carry that does not stay for good."""
        return compact(np.where(self._frozen_by[carried] == _FREE, carried, NONE))

    def resolve(self, array: Array) -> Array:
        """What the elements carry by now: roots that can be removed, each once a row."""
        roots = self._roots(array)
        if roots.shape[1] == 1 and self._single[roots].all():
            return roots
        return self.removable(self.carried(roots))

    def _roots(self, array: Array) -> Array:
        roots = self._parent[array]
        while True:
            above = self._parent[roots]
            if _same(above, roots):
                return roots
            self._parent[array] = above
            roots = above

    def _expand(self, array: Array) -> Array:
        """Replaces every unit that became a product by its parts."""
        while True:
            roots = self._roots(array)
            rows = self._parts_row[roots]
            if (rows == _WHOLE).all():
                return roots
            columns = []
            for column, row in zip(roots.T, rows.T, strict=True):
                divided = np.flatnonzero(row != _WHOLE)
                if not len(divided):
                    columns.append(column[:, None])
                    continue
                parts = np.full((len(column), self._parts.shape[1]), NONE, order="F")
                parts[:, 0] = column
                parts[divided] = self._parts[row[divided]]
                columns.append(parts)
            array = _distinct(np.concatenate(columns, axis=1))

    def join(self, a: Array, b: Array, cause: int) -> None:
        """Makes row ``i`` of ``a`` disappear exactly when row ``i`` of ``b`` does.

        Args:
            a: An array.
            b: An array as long.
            cause: Why, for what this freezes.
        """
        a, b = self.resolve(a), self.resolve(b)
        if a.shape == b.shape and _same(a, b):
            return
        if a.shape[1] == 0 or b.shape[1] == 0:
            self.freeze(a, cause)
            self.freeze(b, cause)
        elif a.shape[1] == b.shape[1] == 1:
            self._join_single(a[:, 0], b[:, 0], cause)
        else:
            self._join_products(a, b, cause)
            self._join_rest(a, b, cause)

    def factor(self, array: Array, product: Array, cause: int) -> None:
        """Joins an array with a product of fresh units: where its own are independent, each becomes its row."""
        found = self.resolve(array)
        if found.shape[1] == 1 and found.min() != NONE and len(np.unique(found)) == len(found):
            self._divide(found[:, 0], product)
        else:
            self.join(found, product, cause)

    def _join_single(self, a: Array, b: Array, cause: int) -> None:
        both = (a != NONE) & (b != NONE)
        if not both.all():
            self.freeze(np.concatenate([a[~both], b[~both]])[:, None], cause)
            a, b = a[both], b[both]
        self._union(a, b)

    def _union(self, a: Array, b: Array) -> None:
        """Merges free units pairwise: the greater root is hung below the lesser until both are one."""
        a, b = self._roots(a), self._roots(b)
        while not _same(a, b):
            low, high = np.minimum(a, b), np.maximum(a, b)
            np.minimum.at(self._parent, high, low)
            a, b = self._roots(low), self._roots(high)

    def _join_products(self, a: Array, b: Array, cause: int) -> None:
        lonely = ((a != NONE).any(1)) != ((b != NONE).any(1))
        if lonely.any():
            self.freeze(a[lonely], cause)
            self.freeze(b[lonely], cause)
            self.join(a, b, cause)
            return
        a, b = _without_equal_columns(a, b)
        if not a.shape[1] or not b.shape[1]:
            self.freeze(np.concatenate([a, b], axis=1), cause)
            return
        if not _one_column_each(a, b):
            self._collapse(a, b)
            return
        parts: dict[tuple[int, int], list[tuple[Array, Array]]] = {}
        for i, j in product(range(a.shape[1]), range(b.shape[1])):
            found = self._common_factor(a[:, i], b[:, j])
            if found is not None:
                units, labels, on_left = found
                parts.setdefault((0, i), []).append((units[on_left], labels[on_left]))
                parts.setdefault((1, j), []).append((units[~on_left], labels[~on_left]))
        for side, array in enumerate((a, b)):
            for column in range(array.shape[1]):
                self._substitute(array[:, column], parts.get((side, column), []), cause)

    def _join_rest(self, a: Array, b: Array, cause: int) -> None:
        """Joins the rows that substitution left different.

        A unit gets the factors of all rows that it is in, also those of a column that some of these rows do not have.
        """
        a, b = self.resolve(a), self.resolve(b)
        rest = _differ(a, b)
        if not rest.any():
            return
        a, b = a[rest], b[rest]
        lonely = ((a != NONE).any(1)) != ((b != NONE).any(1))
        self.freeze(a[lonely], cause)
        self.freeze(b[lonely], cause)
        self._collapse(a[~lonely], b[~lonely])

    def _common_factor(self, a: Array, b: Array) -> tuple[Array, Array, Mask] | None:
        """Units of both columns, the new unit of each one's component, and whether it is of ``a``.

        ``None`` where all rows are one component: removing it would leave nothing.
        """
        both = (a != NONE) & (b != NONE)
        if not both.any():
            return None
        nodes, labels = _components(a[both], b[both])
        count = int(labels.max()) + 1
        if count == 1 and both.all():
            return None
        new = self.fresh(count)[:, 0]
        return nodes, new[labels], np.isin(nodes, a)

    def _substitute(self, column: Array, factors: list[tuple[Array, Array]], cause: int) -> None:
        units = np.unique(column[column != NONE])
        table = np.full((len(units), max(len(factors), 1)), NONE)
        for index, (members, parts) in enumerate(factors):
            table[np.searchsorted(units, members), index] = parts
        counts = (table != NONE).sum(1)
        self.freeze(units[counts == 0][:, None], cause)
        single = counts == 1
        self._union(units[single], table[single].max(1, initial=NONE))
        many = counts > 1
        if many.any():
            self._divide(units[many], table[many])

    def _divide(self, units: Array, rows: Array) -> None:
        """Makes each unit the product of the units in its row."""
        first, self._divided = self._divided, self._divided + len(rows)
        capacity, width = self._parts.shape
        if self._divided > capacity or rows.shape[1] > width:
            table = np.full((max(2 * self._divided, capacity), max(rows.shape[1], width)), NONE)
            table[:capacity, :width] = self._parts
            self._parts = table
        self._parts[first : self._divided, : rows.shape[1]] = rows
        self._parts_row[units] = np.arange(first, self._divided)
        self._single[units] = False
        self._known_single = None

    def _collapse(self, a: Array, b: Array) -> None:
        """The equation that is always right: all units of a row are one."""
        rows = np.concatenate([a, b], axis=1)
        known = rows != NONE
        first = rows[np.arange(len(rows)), known.argmax(1)]
        for column in rows.T:
            both = (column != NONE) & (first != NONE)
            self._union(first[both], column[both])


def _components(a: Array, b: Array) -> tuple[Array, Array]:
    """Nodes of the graph with edges ``(a[i], b[i])`` in ascending order, and the number of each one's component."""
    nodes, index = np.unique(np.concatenate([a, b]), return_inverse=True)
    ends = index.reshape(2, -1)
    graph = coo_array((np.ones(len(a), np.int8), (ends[0], ends[1])), shape=(len(nodes), len(nodes)))
    _, labels = connected_components(graph, directed=False)
    return nodes, labels.astype(np.int64)


def _same(a: Array, b: Array) -> bool:
    return not np.count_nonzero(a != b)


def _differ(a: Array, b: Array) -> Mask:
    """The rows of which one side has a unit that the other has not."""
    width = max(a.shape[1], b.shape[1])
    both = []
    for array in (a, b):
        wide = np.full((len(array), width), NONE)
        wide[:, : array.shape[1]] = array
        both.append(np.sort(wide, axis=1))
    found: Mask = np.any(both[0] != both[1], axis=1)
    return found


def compact(array: Array) -> Array:
    """No column that is empty."""
    used = (array != NONE).any(0)
    return array if used.all() else array[:, used]


def _distinct(array: Array) -> Array:
    """Each unit once a row, and no column that is empty."""
    width = array.shape[1]
    if width > 1:
        array = array.copy()
        for i in range(1, width):
            for j in range(i):
                array[array[:, i] == array[:, j], i] = NONE
    return compact(array)


def _without_equal_columns(a: Array, b: Array) -> tuple[Array, Array]:
    """Leaves out columns that both sides have.

    Where that leaves nothing on one side and more on the other, what is more may never be removed.
    """
    keep_a, keep_b = list(range(a.shape[1])), list(range(b.shape[1]))
    for i in list(keep_a):
        same = next((j for j in keep_b if (a[:, i] == b[:, j]).all()), None)
        if same is not None:
            keep_a.remove(i)
            keep_b.remove(same)
    rest_a, rest_b = a[:, keep_a], b[:, keep_b]
    if keep_a and keep_b and ((rest_a != NONE).any(1) != (rest_b != NONE).any(1)).any():
        return a, b
    return rest_a, rest_b


def _one_column_each(a: Array, b: Array) -> bool:
    """Whether no unit is in two columns, on whichever side: substitution needs that."""
    found = [np.unique(column[column != NONE]) for array in (a, b) for column in array.T]
    together = np.concatenate(found)
    return len(np.unique(together)) == len(together)
