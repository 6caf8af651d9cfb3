"""What stays and why: the chain of operators from a parameter to what keeps its channels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import networkx as nx
import numpy as np
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
    known = readers(program.graph_module)
    for cause, found in _frozen(program, report):
        node = nodes[cause]
        if node.name in barriers or node not in known[id(get_state(program.graph_module, found.member.state))]:
            by_cause[cause].append(found)
    refusals = []
    for cause in sorted(by_cause):
        node, members = nodes[cause], by_cause[cause]
        first = max(members, key=lambda each: each.count)
        starts = known[id(get_state(program.graph_module, first.member.state))]
        chain = [
            first.member.state,
            *(each.name for each in _chain(starts, node, _carrying(program, report, first.units))),
        ]
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
    elements = report.elements
    stays = (elements.carried == NONE).all(1)  # one factor of a product may stay, another go
    causes = np.full(len(stays), NONE)
    causes[stays] = report.units.cause(elements.held[stays])
    counts = elements.counts(stays)
    for name, _ in program.graph_module.named_parameters():
        for dim, factors in enumerate(report.state[name]):
            for place in map(elements.place, factors):
                if place is not None and counts[place]:
                    inside = elements.inside(place)
                    own = causes[inside]
                    for cause in set(own.tolist()) - {NONE}:
                        chosen = own == cause
                        member = Member(name, dim)
                        yield cause, _Frozen(member, int(chosen.sum()), len(own), elements.held[inside][chosen])


def _carrying(program: Program, report: ChannelReport, units: Array) -> set[fx.Node]:
    """The nodes whose values carry any of these units, which may stay."""
    places = report.elements.holding(units)
    found = set()
    for node in program.nodes:
        layout = report.layouts.get(node.name, ())
        dims = (dim for each in (layout if isinstance(layout, list) else [layout]) for dim in each)
        if any(report.elements.place(factor) in places for dim in dims for factor in dim):
            found.add(node)
    return found


def _chain(starts: list[fx.Node], cause: fx.Node, carrying: set[fx.Node]) -> list[fx.Node]:
    """The shortest way from a reader of a parameter to the cause, by values that carry what is frozen."""
    allowed = {cause, *carrying}
    graph: nx.Graph[fx.Node] = nx.Graph()
    graph.add_nodes_from([*starts, cause])
    graph.add_edges_from((node, user) for node in allowed for user in node.users if user in allowed)
    paths = [nx.shortest_path(graph, start, cause) for start in starts if nx.has_path(graph, start, cause)]
    return min(paths, key=len, default=[*starts[:1], cause])
