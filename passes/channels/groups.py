"""What the channels analysis found: groups of units, their members, and why the rest stays."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import networkx as nx
import numpy as np
import numpy.typing as npt
from fxcompress.passes.channels.elements import Elements, Survivors
from fxcompress.passes.channels.layout import Factor, Layout
from fxcompress.passes.channels.permutations import Permutation
from fxcompress.passes.channels.units import NONE, Array, Mask, Units

from fxcompress.ir.program import Diagnostic, Program


@dataclass(frozen=True, order=True)
class Member:
    """A dim of a parameter or buffer.

    Attributes:
        state: Qualified name.
        dim: The dim.
    """

    state: str
    dim: int

    def __str__(self) -> str:
        return f"{self.state}:{self.dim}"


@dataclass(frozen=True, eq=False, repr=False)
class ChannelGroup:
    """Units that occur in the same dims of the same parameters, such as the channels of one residual stream.

    Attributes:
        units: Numbers of the units.
        members: Dims that they occur in.
        factor: ``outer`` for what a product repeats (heads, groups), ``inner`` for what is repeated (head dims,
            channels in a group), ``whole`` where an element is one unit.
    """

    units: Array
    members: tuple[Member, ...]
    factor: str

    @property
    def name(self) -> str:
        """The first member, which no other group of the same size pattern shares with all others."""
        return str(self.members[0])

    def __len__(self) -> int:
        return len(self.units)

    def __repr__(self) -> str:
        kind = "" if self.factor == "whole" else f"{self.factor} "
        return f"ChannelGroup({self.name}: {len(self)} {kind}units in {len(self.members)} dims)"


@dataclass(frozen=True, eq=False, repr=False)
class ChannelReport:
    """The channel dependencies of a Program.

    Attributes:
        groups: What can be removed, in the order of the parameters.
        diagnostics: Operators that were barriers.
        units: The units and what they became.
        elements: The elements of all dims and what they carry.
        layouts: Node name -> layout of its value; a list for several values.
        state: Name of a parameter or buffer -> its layout.
        permutations: Node name -> the permutation that it ends.
        causes: Names of nodes by number, for what froze what.
    """

    groups: tuple[ChannelGroup, ...]
    diagnostics: tuple[Diagnostic, ...]
    units: Units
    elements: Elements
    layouts: Mapping[str, Any]
    state: Mapping[str, Layout]
    permutations: Mapping[str, Permutation]
    causes: tuple[str, ...]

    def __repr__(self) -> str:
        removable = sum(len(group) for group in self.groups)
        return f"ChannelReport({removable} units in {len(self.groups)} groups, {len(self.diagnostics)} barriers)"

    def resolved(self, factor: Factor) -> Array:
        """The units that a factor's elements carry in the end."""
        return self.elements.of(factor)

    def removed_mask(self, units: npt.ArrayLike) -> Mask:
        """For each unit whether it is among the chosen ones, with one ``False`` more at the end."""
        removed = np.zeros(self.units.count + 1, np.bool_)
        removed[np.asarray(units, np.int64)] = True
        return removed

    def survivors(self, removed: Mask) -> Survivors:
        """What stays of each dim, given the mask of a choice of units."""
        return Survivors(self.elements, removed)

    @cached_property
    def graph(self) -> nx.Graph[Any]:
        """Groups (by number) on one side, parameters and buffers (by name) on the other; edges carry the dims."""
        graph: nx.Graph[Any] = nx.Graph()
        for index, group in enumerate(self.groups):
            graph.add_node(index, group=group)
            for member in group.members:
                if graph.has_edge(index, member.state):
                    graph.edges[index, member.state]["dims"] += (member.dim,)
                else:
                    graph.add_edge(index, member.state, dims=(member.dim,))
        return graph

    @cached_property
    def digest(self) -> bytes:
        """A digest of the groups and of which unit each element of each parameter and buffer carries."""
        found = hashlib.blake2b(digest_size=32)
        numbers = np.full(self.units.count + 1, -1, "<i8")
        for number, group in enumerate(self.groups):
            found.update(f"{number} {group.factor} {len(group)} {' '.join(map(str, group.members))}\n".encode())
            numbers[group.units] = np.arange(len(group)) + (number << 32)
        known = 0
        for name, layout in self.state.items():
            factors = [factor for dim in layout for factor in dim]
            places = [self.elements.place(factor) for factor in factors]
            found.update(f"{name} {[factor.size for factor in factors]} {places}\n".encode())
            known = max([known, *(place + 1 for place in places if place is not None)])
        found.update(numbers[self.elements.carried[: self.elements.bounds[known]]].tobytes())
        return found.digest()

    def barriers(self, state: str, dim: int) -> Iterator[str]:
        """The nodes that keep elements of a parameter's dim, each once."""
        layout = self.state[state][dim]
        seen: set[int] = set()
        for factor in layout:
            if factor.units is not None:
                seen |= set(self.units.cause(factor.units).tolist()) - {NONE}
        for number in sorted(seen):
            yield self.causes[number]


def report(
    program: Program,
    units: Units,
    layouts: Mapping[str, Any],
    state: Mapping[str, Layout],
    permutations: Mapping[str, Permutation],
    diagnostics: Collection[Diagnostic],
) -> ChannelReport:
    """Collects the groups from what a walk over the graph left."""
    elements = Elements(units, _dims(state, layouts))
    groups = tuple(_groups(program, units, elements, state))
    causes = tuple(node.name for node in program.nodes)
    return ChannelReport(groups, tuple(diagnostics), units, elements, layouts, state, permutations, causes)


def _dims(state: Mapping[str, Layout], layouts: Mapping[str, Any]) -> Iterator[tuple[str, Layout]]:
    for name, layout in (*state.items(), *layouts.items()):
        yield from ((name, each) for each in (layout if isinstance(layout, list) else [layout]))


_FACTORS = ("whole", "outer", "inner")


def _groups(program: Program, units: Units, elements: Elements, state: Mapping[str, Layout]) -> Iterator[ChannelGroup]:
    """Units by the set of the dims that they occur in and by their level; sets are compared by a sum of codes."""
    members = _members(elements, state)
    trainable = {name for name, _ in program.graph_module.named_parameters(remove_duplicate=False)}
    levels = elements.carried.shape[1] + 1
    codes = np.random.default_rng(0).integers(1, 2**63, levels + len(members), np.uint64)
    signature = np.zeros(units.count + 1, np.uint64)
    useful = np.zeros(units.count + 1, np.bool_)
    level = np.zeros(units.count + 1, np.int64)
    for place, inside in _by_place(members).items():
        own = elements.at(place)
        signature[own] += codes[[levels + number for number in inside]].sum()  # once a unit, however often it occurs
        if any(members[number][0].state in trainable for number in inside):
            useful[own] = True
        _mark_levels(own, level)
    useful[NONE] = False
    found = np.flatnonzero(useful)
    if len(found):
        yield from _grouped(elements, members, found, signature[found] + codes[level[found]], level)


def _grouped(
    elements: Elements,
    members: list[tuple[Member, int]],
    units: Array,
    signatures: npt.NDArray[np.uint64],
    level: Array,
) -> Iterator[ChannelGroup]:
    """Groups of the units of one signature, in the order of their members."""
    _, first, number = np.unique(signatures, return_index=True, return_inverse=True)
    inside = np.split(units[np.argsort(number, kind="stable")], np.cumsum(np.bincount(number))[:-1])
    represented = np.full(len(level), NONE)
    represented[units[first]] = np.arange(len(first))
    of_group: list[list[int]] = [[] for _ in first]
    for place, numbers in _by_place(members).items():
        groups = represented[elements.at(place)]
        for group in set(groups[groups != NONE].tolist()):
            of_group[group] += numbers
    ordered = sorted(zip(map(sorted, of_group), inside, strict=True), key=lambda entry: (entry[0][0], entry[1][0]))
    for numbers, own in ordered:
        yield ChannelGroup(own, tuple(members[each][0] for each in numbers), _FACTORS[min(level[own[0]], 2)])


def _members(elements: Elements, state: Mapping[str, Layout]) -> list[tuple[Member, int]]:
    """The dims of parameters and buffers that have removable elements, each with its array; tied tensors once."""
    found = []
    seen: set[int] = set()
    for name, layout in state.items():
        if id(layout) not in seen:
            seen.add(id(layout))
            for dim, factors in enumerate(layout):
                for place in map(elements.place, factors):
                    if place is not None and elements.at(place).shape[1]:
                        found.append((Member(name, dim), place))
    return found


def _by_place(members: list[tuple[Member, int]]) -> dict[int, list[int]]:
    """Array -> the numbers of the members that are made of it: many dims share one, and are looked at together."""
    found: dict[int, list[int]] = {}
    for number, (_, place) in enumerate(members):
        found.setdefault(place, []).append(number)
    return found


def _mark_levels(carried: Array, level: Array) -> None:
    """Where elements carry several units, the first is of level 1, the next of level 2, and so on.

    The first dim that says so wins: units of one element then never are in one group, whose choice could empty a dim.
    """
    if carried.shape[1] < 2:
        return
    known = carried != NONE
    place = np.where(known.sum(1, keepdims=True) > 1, known.cumsum(1), 0)
    place[~known | (level[carried] > 0)] = 0
    for column in range(carried.shape[1]):
        rows = place[:, column] > 0
        level[carried[rows, column]] = place[rows, column]
