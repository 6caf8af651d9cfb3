"""Layouts: which elements each dim of a tensor has.

A dim is a product of factors, outermost first. A factor is an array of elements that carry units, or a *position*: a
number of places (batch, space, sequence) that nothing can be removed from. So ``(batch * heads, tokens, head_dim)`` is
``((B, H), (T,), (D,))`` and no array is ever as long as the batch.

Sizes are plain integers. A symbolic size is represented by a large number with many divisors and a prime of its own
(:class:`Sizes`), so that reshapes of dynamic dims line up by arithmetic alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import sympy  # type: ignore[import-untyped]
import torch
from fxcompress.passes.channels.units import NONE, Array, Units

_LARGEST_ARRAY = 1 << 22


class Factor:
    """A factor of a dim.

    Elements of a new tensor have units of their own, which are drawn when something asks for them. Most dims of
    parameters never need any: before that they are joined with channels that another parameter made, and take over
    theirs.

    Args:
        size: Number of elements.
        units: Their units, ``(size, k)``.
        source: Where units of their own come from; a factor with neither is a position.
    """

    def __init__(self, size: int, units: Array | None = None, source: Units | None = None) -> None:
        self.size = size
        self._units = units
        self._source = source

    @property
    def units(self) -> Array | None:
        """The units of the elements; ``None`` for a position."""
        if self._units is None and self._source is not None:
            self._units = self._source.fresh(self.size)
        return self._units

    @property
    def is_position(self) -> bool:
        """Whether no element carries a unit."""
        return self._units is None and self._source is None

    def take_over(self, other: Factor) -> bool:
        """Makes the elements those of another factor, if nothing is known of them yet and each has one unit there."""
        source, units = self._source, other.units
        if self._units is not None or source is None or units is None or not source.are_single(units):
            return False
        self._units = units
        return True


Dim = tuple[Factor, ...]
"""Factors of a dim, outermost first; those of size 1 are left out."""

Layout = tuple[Dim, ...]
"""The dims of a tensor."""


def position(size: int) -> Dim:
    """A dim that nothing can be removed from."""
    return () if size == 1 else (Factor(size),)


def elements(units: Array) -> Dim:
    """A dim whose elements carry these units."""
    return () if len(units) == 1 else (Factor(len(units), units),)


def dim_size(dim: Dim) -> int:
    """Number of elements of a dim."""
    return math.prod(factor.size for factor in dim)


def shape_of(layout: Layout) -> tuple[int, ...]:
    """The sizes of a layout's dims."""
    return tuple(dim_size(dim) for dim in layout)


def is_position(dim: Dim) -> bool:
    """Whether no element of the dim carries a unit."""
    return all(factor.is_position for factor in dim)


def is_dynamic(size: int) -> bool:
    """Whether a size stands for a symbolic one; no dim of a real tensor is as long."""
    return size >= 1 << 21


def factor_of(size: int | torch.SymInt) -> int:
    """What is known of a size: itself, or the number that a symbolic one is a multiple of (4 for batch * 4)."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    return int(size.node.expr.as_content_primitive()[0])


class Sizes:
    """Concrete integers for symbolic sizes: equal expressions get equal numbers, others different ones."""

    DIVISORS = 2**6 * 3**2 * 5 * 7

    def __init__(self) -> None:
        self._symbols: dict[sympy.Symbol, sympy.Integer] = {}
        self._known: dict[sympy.Expr, int] = {}
        self._stand_ins: set[int] = set()

    def __call__(self, size: int | torch.SymInt) -> int:
        """The number that stands for a size."""
        if not isinstance(size, torch.SymInt):
            return int(size)
        expression = size.node.expr
        if expression not in self._known:
            for symbol in sorted(expression.free_symbols, key=str):
                if symbol not in self._symbols:
                    prime = sympy.sieve[1000 + 50 * len(self._symbols)]
                    self._symbols[symbol] = sympy.Integer(self.DIVISORS * prime)
            self._known[expression] = int(expression.xreplace(self._symbols))
            if expression.free_symbols:
                self._stand_ins.add(self._known[expression])
        return self._known[expression]

    def stands_for(self, number: int) -> bool:
        """Whether a number is one that stands for a symbolic size."""
        return number in self._stand_ins

    def shape(self, tensor: torch.Tensor) -> tuple[int, ...]:
        """The numbers that stand for a tensor's shape."""
        return tuple(self(size) for size in tensor.shape)


class Algebra:
    """Equations and reshapes over dims; what cannot be expressed is frozen.

    Attributes:
        units: The units that the equations are between.
        cause: Number of the node whose rule runs, kept as the reason for what it freezes.
    """

    def __init__(self, units: Units) -> None:
        self.units = units
        self.cause = 0

    def fresh(self, size: int) -> Dim:
        """A dim of new units."""
        return () if size == 1 else (Factor(size, source=self.units),)

    def freeze(self, *dims: Dim) -> None:
        """Keeps all elements of dims."""
        for dim in dims:
            for factor in dim:
                if factor.units is not None:
                    self.units.freeze(factor.units, self.cause)

    def flat(self, dim: Dim) -> Array:
        """The elements of a dim as one array; a position's carry nothing."""
        if len(dim) == 1 and dim[0].units is not None:
            return dim[0].units
        array: Array = np.empty((1, 0), np.int64)
        for factor in dim:
            inner = np.empty((factor.size, 0), np.int64) if factor.units is None else factor.units
            outer = np.repeat(array, len(inner), axis=0)
            array = np.concatenate([outer, np.tile(inner, (len(array), 1))], axis=1)
        return array

    def join(self, a: Dim, b: Dim) -> None:
        """Makes the elements of two dims of one size disappear together."""
        if a is b:
            return
        if is_position(a) or is_position(b):
            self.freeze(a, b)
        elif [factor.size for factor in a] == [factor.size for factor in b]:
            for left, right in zip(a, b, strict=True):
                self._join_factors(left, right)
        else:
            self._join_unlike(a, b)

    def _join_factors(self, a: Factor, b: Factor) -> None:
        if a is b or b.take_over(a) or a.take_over(b):
            return
        if a.units is None or b.units is None:
            self.freeze((a,), (b,))
        elif a.units is not b.units:
            self.units.join(a.units, b.units, self.cause)

    def _join_unlike(self, a: Dim, b: Dim) -> None:
        """Dims of other factors: both are cut where either is."""
        bounds = sorted({*_bounds(a), *_bounds(b)})
        sizes = [high // low for low, high in itertools.pairwise(bounds)]
        nested = all(high % low == 0 for low, high in itertools.pairwise(bounds))
        if nested and bounds[-1] == dim_size(a) == dim_size(b):
            pairs = zip(self.cut(a, sizes), self.cut(b, sizes), strict=True)
            for left, right in pairs:
                self.join(left, right)
        elif dim_size(a) == dim_size(b) <= _LARGEST_ARRAY:
            self.units.join(self.flat(a), self.flat(b), self.cause)
        else:
            self.freeze(a, b)

    def split(self, dim: Dim, outer: int) -> tuple[Dim, Dim]:
        """A dim seen as ``(outer, rest)``."""
        left, right = self.cut(dim, [outer, dim_size(dim) // max(outer, 1)])
        return left, right

    def reshape(self, layout: Layout, sizes: Sequence[int]) -> Layout:
        """The layout of a tensor in row-major order seen with other sizes."""
        return tuple(self.cut(tuple(factor for dim in layout for factor in dim), sizes))

    def cut(self, factors: Dim, sizes: Sequence[int]) -> list[Dim]:
        """Factors in row-major order, grouped and split into dims of the given sizes."""
        result: list[Dim] = []
        rest = list(factors)
        index = 0
        while index < len(sizes):
            taken: list[Factor] = []
            wanted: list[int] = []
            have, need = 1, 1
            while index < len(sizes) and (not wanted or have != need):
                if have > need or not rest or need == 1:
                    wanted.append(sizes[index])
                    need *= sizes[index]
                    index += 1
                while have < need and rest:
                    taken.append(rest.pop(0))
                    have *= taken[-1].size
                if have < need and not rest:
                    break
            result += self._cut_group(taken, wanted)
        return result

    def _cut_group(self, factors: list[Factor], sizes: list[int]) -> list[Dim]:
        """Cuts factors that have as many elements as the sizes ask for."""
        if is_position(tuple(factors)):
            return [position(size) for size in sizes]
        if len([size for size in sizes if size != 1]) == 1:
            whole = tuple(factor for factor in factors if factor.size != 1)
            return [whole if size != 1 else () for size in sizes]
        nested = self._cut_nested(factors, sizes)
        if nested is not None:
            return nested
        total = math.prod(sizes)
        if total > _LARGEST_ARRAY or math.prod(factor.size for factor in factors) != total:
            self.freeze(tuple(factors))
            return [position(size) for size in sizes]
        return self._factored(self.flat(tuple(factors)), sizes)

    def _cut_nested(self, factors: list[Factor], sizes: list[int]) -> list[Dim] | None:
        """Cuts at boundaries that lie between factors or divide one; ``None`` where one lies across."""
        bounds = sorted({*_bounds(factors), *_bounds([Factor(size) for size in sizes])})
        if any(high % low for low, high in itertools.pairwise(bounds)):
            return None
        pieces: list[Factor] = []
        low = 1
        for factor in factors:
            high = low * factor.size
            inside = [bound for bound in bounds if low <= bound <= high]
            parts = [b // a for a, b in itertools.pairwise(inside)]
            pieces += self._split_factor(factor, parts)
            low = high
        result: list[Dim] = []
        for size in sizes:
            dim: list[Factor] = []
            while math.prod(piece.size for piece in dim) < size:
                dim.append(pieces.pop(0))
            result.append(tuple(dim))
        return result

    def _split_factor(self, factor: Factor, sizes: list[int]) -> list[Factor]:
        if len(sizes) <= 1:
            return [factor] if factor.size > 1 else []
        if factor.units is None:
            return [Factor(size) for size in sizes]
        return [piece for dim in self._factored(factor.units, sizes) for piece in dim]

    def _factored(self, array: Array, sizes: Sequence[int]) -> list[Dim]:
        """An array seen as a product of dims: of those that are there, or else of fresh ones."""
        array = self.units.resolve(array)
        known = _separated(array, sizes)
        if known is not None:
            return known
        dims = [self.fresh(size) for size in sizes]
        self.units.factor(array, self.flat(tuple(factor for dim in dims for factor in dim)), self.cause)
        return dims

    def concatenated(self, dims: Iterable[Dim]) -> Dim:
        """Dims one after the other; a dynamic one among them freezes the others."""
        parts = list(dims)
        if all(is_position(dim) for dim in parts) or sum(map(dim_size, parts)) > _LARGEST_ARRAY:
            self.freeze(*parts)
            return position(sum(dim_size(dim) for dim in parts))
        arrays = [self.flat(dim) for dim in parts]
        width = max(array.shape[1] for array in arrays)
        padded = [np.pad(a, ((0, 0), (0, width - a.shape[1])), constant_values=NONE) for a in arrays]
        return elements(np.concatenate(padded))

    def taken(self, dim: Dim, index: Array | slice) -> Dim:
        """The elements of a dim at an index, in its order."""
        if is_position(dim) and dim_size(dim) > _LARGEST_ARRAY:
            raise ValueError("a dynamic dim has no elements to take")
        chosen = self.flat(dim)[index]
        if len(chosen) == 1:  # a dim of one element cannot lose it
            self.units.freeze(chosen, self.cause)
        return elements(chosen)


def _separated(array: Array, sizes: Sequence[int]) -> list[Dim] | None:
    """The dims of a grid whose columns vary along one axis each, and some along each axis; ``None`` for others."""
    found: list[list[Array]] = [[] for _ in sizes]
    for column in array.T:
        grid = column.reshape(sizes)
        for axis, size in enumerate(sizes):
            line = grid[tuple(slice(None) if place == axis else slice(1) for place in range(len(sizes)))]
            if size > 1 and (grid == line).all() and (line != line.flat[0]).any():
                found[axis].append(line.reshape(-1))
                break
        else:
            return None
    if not all(columns for size, columns in zip(sizes, found, strict=True) if size > 1):
        return None
    return [elements(np.stack(columns, axis=1)) if columns else () for columns in found]


def _bounds(dim: Iterable[Factor]) -> list[int]:
    bounds = [1]
    for factor in dim:
        bounds.append(bounds[-1] * factor.size)
    return bounds


def broadcast(algebra: Algebra, layouts: Sequence[Layout]) -> Layout:
    """Joins operands of an element-wise operation dim by dim, aligned at the last; size 1 goes with anything."""
    rank = max((len(layout) for layout in layouts), default=0)
    result: list[Dim] = []
    for back in range(rank, 0, -1):
        dims = [layout[-back] for layout in layouts if len(layout) >= back and layout[-back]]
        for other in dims[1:]:
            algebra.join(dims[0], other)
        result.append(dims[0] if dims else ())
    return tuple(result)


def value_layout(value: Any, sizes: Sizes) -> Layout:
    """A layout of positions only, for a tensor that nothing can be removed from."""
    return tuple(position(size) for size in sizes.shape(value))
