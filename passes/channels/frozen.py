"""What stays and why: the chain of operators from a parameter to what keeps its channels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import networkx as nx
import numpy as np
from fxcompress.passes.channels.elements import joined
from fxcompress.passes.channels.groups import ChannelReport, Member
from fxcompress.passes.channels.plan import listed
from fxcompress.passes.channels.units import NONE, Array
from torch import fx

from fxcompress.ir.ops import get_state, readers
from fxcompress.ir.program import Program
from fxcompress.pass_base import Refusal


@dataclass(frozen=True, eq=False)
class _Frozen:
    """Elements of a parameter's dim that stay for one cause."""

    member: Member
    count: int
    size: int
    units: Array


def frozen(program: Program, report: ChannelReport) -> tuple[Refusal, ...]:
    """One refusal for each node that keeps channels of parameters it does not read itself."""
    by_cause: dict[int, list[_Frozen]] = defaultdict(list)
    nodes = list(program.nodes)
    barriers = {diagnostic.path: diagnostic for diagnostic in report.diagnostics}
    known, carriers = readers(program.graph_module), _Carriers(program, report)
    for cause, found in _frozen(program, report):
        node = nodes[cause]
        if node.name in barriers or node not in known[id(get_state(program.graph_module, found.member.state))]:
            by_cause[cause].append(found)
    refusals = []
    for cause in sorted(by_cause):
        node, members = nodes[cause], by_cause[cause]
        first = max(members, key=lambda each: each.count)
        starts = known[id(get_state(program.graph_module, first.member.state))]
        chain = carriers.chain(starts, node, first)
        barrier = barriers.get(node.name)
        code, why = ("frozen", _why(node)) if barrier is None else (barrier.code, barrier.message)
        refusals.append(
            Refusal(code, node.name, f"{listed(list(map(_text, members)))} stay: {' -> '.join(chain)}; {why}")
        )
    return tuple(refusals)


def _why(node: fx.Node) -> str:
    if node.op == "output":
        return "the model's outputs keep their sizes"
    return f"{node.target} needs all of them, or joins them with what cannot be removed"


def _text(each: _Frozen) -> str:
    return f"{each.member} ({each.count} channels)" if each.count == each.size else f"{each.count} of {each.member}"


def _frozen(program: Program, report: ChannelReport) -> Iterator[tuple[int, _Frozen]]:
    members, arrays = [], []
    for name, _ in program.graph_module.named_parameters():
        for dim, factors in enumerate(report.state[name]):
            for factor in factors:
                if factor.units is not None:
                    members.append(Member(name, dim))
                    arrays.append(factor.units)
    if not arrays:
        return
    together = joined(arrays)
    removable = (report.units.resolve(together) != NONE).any(1)  # one factor of a product may stay, another go
    causes, units = np.where(removable, NONE, report.units.cause(together)), report.units.carried(together)
    bounds = np.cumsum([0, *map(len, arrays)])
    for member, first, last in zip(members, bounds[:-1], bounds[1:], strict=True):
        own = causes[first:last]
        for cause in set(own.tolist()) - {NONE}:
            chosen = own == cause
            yield cause, _Frozen(member, int(chosen.sum()), last - first, units[first:last][chosen])


class _Carriers:
    """Which nodes' values carry which units, those that stay included."""

    def __init__(self, program: Program, report: ChannelReport) -> None:
        self._nodes, arrays = [], []
        for node in program.nodes:
            layout = report.layouts.get(node.name)
            for each in layout if isinstance(layout, list) else [layout or ()]:
                for factor in (factor for dim in each for factor in dim if factor.units is not None):
                    self._nodes.append(node)
                    arrays.append(factor.units)
        self._bounds = np.cumsum([0, *map(len, arrays)])
        self._units = report.units.carried(joined(arrays))

    def chain(self, starts: list[fx.Node], cause: fx.Node, found: _Frozen) -> list[str]:
        """The shortest way from a reader of a parameter to the cause, by values that carry what is frozen."""
        carrying = np.isin(self._units, found.units[found.units != NONE]).any(1)
        places = np.flatnonzero(np.add.reduceat(carrying, self._bounds[:-1], dtype=np.int64))
        allowed = {cause, *(self._nodes[place] for place in places)}
        graph: nx.Graph[fx.Node] = nx.Graph()
        graph.add_nodes_from([*starts, cause])
        graph.add_edges_from((node, user) for node in allowed for user in node.users if user in allowed)
        paths = [nx.shortest_path(graph, start, cause) for start in starts if nx.has_path(graph, start, cause)]
        path = min(paths, key=len, default=[*starts[:1], cause])
        return [found.member.state, *(node.name for node in path)]
