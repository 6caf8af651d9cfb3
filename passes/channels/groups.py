"""What the channels analysis found: groups of units, their members, and why the rest stays."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import networkx as nx
import numpy as np
import numpy.typing as npt
from fxcompress.passes.channels.layout import Dim, Factor, Layout
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
        layouts: Node name -> layout of its value; a list for several values.
        state: Name of a parameter or buffer -> its layout.
        permutations: Node name -> the permutation that it ends.
        causes: Names of nodes by number, for what froze what.
    """

    groups: tuple[ChannelGroup, ...]
    diagnostics: tuple[Diagnostic, ...]
    units: Units
    layouts: Mapping[str, Any]
    state: Mapping[str, Layout]
    permutations: Mapping[str, Permutation]
    causes: tuple[str, ...]
    _resolved: dict[int, Array] = field(default_factory=dict)

    def __repr__(self) -> str:
        removable = sum(len(group) for group in self.groups)
        return f"ChannelReport({removable} units in {len(self.groups)} groups, {len(self.diagnostics)} barriers)"

    def resolved(self, factor: Factor) -> Array:
        """The units that a factor's elements carry in the end."""
        assert factor.units is not None
        key = id(factor)
        if key not in self._resolved:
            self._resolved[key] = self.units.resolve(factor.units)
        return self._resolved[key]

    def kept(self, dim: Dim, removed: Mask) -> list[Mask | None]:
        """For each factor of a dim, which elements stay; ``None`` where all do.

        Args:
            dim: A dim of one of the layouts.
            removed: For each unit whether it is removed, with one ``False`` more at the end.
        """
        found: list[Mask | None] = []
        for factor in dim:
            if factor.units is None:
                found.append(None)
                continue
            stay: Mask = np.logical_not(removed[self.resolved(factor)].any(axis=1))
            found.append(None if stay.all() else stay)
        return found

    def kept_elements(self, dim: Dim, removed: Mask) -> Mask | None:
        """Which elements of a dim stay, flat; ``None`` where all do."""
        masks = self.kept(dim, removed)
        if all(mask is None for mask in masks):
            return None
        flat = np.ones(1, np.bool_)
        for factor, mask in zip(dim, masks, strict=True):
            own = np.ones(factor.size, np.bool_) if mask is None else mask
            flat = (flat[:, None] & own[None, :]).reshape(-1)
        return flat

    def removed_mask(self, units: npt.ArrayLike) -> Mask:
        """The mask that :meth:`kept` takes, for a choice of units."""
        removed = np.zeros(self.units.count + 1, np.bool_)
        removed[np.asarray(units, np.int64)] = True
        return removed

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
    causes = tuple(node.name for node in program.nodes)
    groups = tuple(_groups(program, units, state))
    return ChannelReport(groups, tuple(diagnostics), units, layouts, state, permutations, causes)


def _groups(program: Program, units: Units, state: Mapping[str, Layout]) -> Iterator[ChannelGroup]:
    members: list[Member] = []
    trainable: list[bool] = []
    found_units: list[Array] = []
    found_members: list[Array] = []
    level = np.zeros(units.count, np.int64)
    seen: set[int] = set()
    parameters = {name for name, _ in program.graph_module.named_parameters(remove_duplicate=False)}
    for name, layout in state.items():
        if id(layout) in seen:
            continue
        seen.add(id(layout))
        for dim, factors in enumerate(layout):
            for elements in factors:
                assert elements.units is not None
                assert len(factors) == 1
                carried = units.resolve(elements.units)
                _mark_levels(carried, level)
                distinct = np.unique(carried[carried != NONE])
                if len(distinct):
                    found_units.append(distinct)
                    found_members.append(np.full(len(distinct), len(members)))
                    members.append(Member(name, dim))
                    trainable.append(name in parameters)
    if members:
        yield from _grouped(
            np.concatenate(found_units), np.concatenate(found_members), members, np.array(trainable), level
        )


_FACTORS = ("whole", "outer", "inner")


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


def _grouped(
    units: Array, member_of: Array, members: list[Member], trainable: Mask, level: Array
) -> Iterator[ChannelGroup]:
    """Groups units by the set of their members and their level, compared by a hash."""
    nodes, index = np.unique(units, return_inverse=True)
    codes = np.random.default_rng(0).integers(1, 2**63, len(members) + int(level.max()) + 1, np.uint64)
    signature = codes[len(members) + level[nodes]]
    np.add.at(signature, index, codes[member_of])
    useful = np.zeros(len(nodes), np.bool_)
    np.logical_or.at(useful, index, trainable[member_of])
    by_unit = np.argsort(index, kind="stable")
    starts = np.searchsorted(index[by_unit], np.arange(len(nodes) + 1))
    _, first, group = np.unique(signature, return_index=True, return_inverse=True)
    by_group = np.argsort(group, kind="stable")
    bounds = np.searchsorted(group[by_group], np.arange(len(first) + 1))
    found = []
    for number, representative in enumerate(first):
        if useful[representative]:
            own = np.sort(member_of[by_unit[starts[representative] : starts[representative + 1]]])
            inside = nodes[by_group[bounds[number] : bounds[number + 1]]]
            places = tuple(members[member] for member in own)
            found.append((own[0], inside[0], ChannelGroup(inside, places, _FACTORS[min(level[inside[0]], 2)])))
    for _, _, group_ in sorted(found, key=lambda entry: entry[:2]):
        yield group_
