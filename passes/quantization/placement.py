"""Placement: between which operators values become integers.

Readers decide. A value becomes integers where it is made, for those of its readers that compute in integers; what only
passes values through hands the wish of its readers on to what it reads. So there is nothing between operators that the
engine computes as one, and a value that several read becomes integers once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import networkx as nx
import torch
from fxcompress.passes.quantization.grid import Grid
from fxcompress.passes.quantization.targets import CONVOLUTIONS, NORMS, PADS, Target
from torch import fx

from fxcompress.ir.ops import Operation, operation


@dataclass(frozen=True)
class Point:
    """A value that becomes integers.

    Attributes:
        source: The node that computes it.
        readers: The nodes that read the integers; others read the value as it was.
        sharing: Number of the set of points that have one scale and zero point.
        grid: The integers that it becomes.
    """

    source: fx.Node
    readers: tuple[fx.Node, ...]
    sharing: int
    grid: Grid


class Placement:
    """Which values of a graph become integers on a target.

    Args:
        graph_module: The graph.
        target: The target.
        skipped: Nodes that stay in floating point.
        apart: Joins whose operands do not get one scale.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        target: Target,
        skipped: Collection[fx.Node] = (),
        apart: Collection[fx.Node] = (),
    ) -> None:
        self._target, self._apart = target, frozenset(apart)
        self._calls: dict[fx.Node, Operation] = {}
        self._constant: set[fx.Node] = set()
        for node in graph_module.graph.nodes:
            call = operation(graph_module, node)
            if call is not None and node not in skipped:
                self._calls[node] = call
            if node.op != "placeholder" and self._constant.issuperset(node.all_input_nodes):
                self._constant.add(node)
        self._integral = self._made_of_integers()
        self._wishes: dict[fx.Node, tuple[fx.Node, ...]] = {}
        for node in reversed(graph_module.graph.nodes):
            if self._is_real(node):
                self._wishes[node] = tuple(user for user in node.users if self._wants(user, node))

    def points(self) -> list[Point]:
        """The points in execution order."""
        readers = {node: found for node, found in self._wishes.items() if found and not self._passes(node)}
        sharing = self._sharing(readers)
        if self._target.closed:
            self._close(readers, sharing)
        sets = {node: index for index, found in enumerate(nx.connected_components(sharing)) for node in found}
        factors = {sets[origin] for factor in self._factors() for origin in self._origins(factor) if origin in sets}
        grids = {number: self._target.factor if number in factors else self._target.grid for number in sets.values()}
        return [
            Point(node, readers[node], sets[node], grids[sets[node]])
            for node in reversed(self._wishes)
            if node in readers
        ]

    def joined(self) -> dict[fx.Node, list[fx.Node]]:
        """Join -> the points that get one scale because it passes integers through."""
        return {
            node: [origin for source in node.all_input_nodes for origin in self._origins(source)]
            for node, call in self._calls.items()
            if call.overload in self._target.joins and self._passes(node)
        }

    def _wants(self, user: fx.Node, source: fx.Node) -> bool:
        """Whether a reader takes a value as integers."""
        call = self._calls.get(user)
        if call is None:
            return False
        named = {name for name, operand in call.operands.items() if operand is source}
        if named & set(self._target.reads(call.overload)):
            return self._computes(call)
        if named & set(self._target.carriers.get(call.overload, ())):
            if self._fused_with(source) is user or not self._computes(call):
                return False
            # a norm evens channels out: before it they have one scale only where they are of integers anyway
            return user in self._integral or (call.overload not in NORMS and self._gives_integers(call))
        return self._passes(user)

    def _made_of_integers(self) -> set[fx.Node]:
        """What comes from layers in integers through nothing but carriers, activations, views and joins.

        On that way rounding is part of what makes a value, unless another reader needs it in floating point.
        """
        target, found = self._target, set[fx.Node]()
        passing = {*target.fused, *target.views, *target.joins}
        for node, call in self._calls.items():
            sources = [source for source in node.all_input_nodes if self._is_real(source)]
            made = bool(sources) and found.issuperset(sources) and all(map(self._has_integer_readers, sources))
            made &= node not in self._apart
            carried = call.overload in passing or (call.overload in target.carriers and self._computes(call))
            if (made and carried) or (call.overload in target.layers and self._computes(call)):
                found.add(node)
        return found

    def _has_integer_readers(self, node: fx.Node) -> bool:
        """Whether the target can compute all that reads a value in integers."""
        target = self._target
        able = target.layers.keys() | target.carriers.keys() | target.fused | target.views | target.joins
        return all(user in self._calls and self._calls[user].overload in able for user in node.users)

    def _computes(self, call: Operation) -> bool:
        """Whether all that an operator reads as integers is computed; the weight of a layer becomes integers apart."""
        names = self._target.reads(call.overload) or self._target.carriers[call.overload]
        operands = [call.operands.get(name) for name in names]
        return all(operand is not None and self._is_real(operand) for operand in operands)

    def _factors(self) -> Iterator[fx.Node]:
        """The second factors of products."""
        for call in self._calls.values():
            names = self._target.products.get(call.overload)
            if names is not None and self._computes(call):
                yield call.operands[names[1]]

    def _passes(self, node: fx.Node) -> bool:
        """Whether a node hands integers on as they are."""
        call = self._calls.get(node)
        if call is None or node in self._apart or not self._complete(node):
            return False
        if not self._constant.isdisjoint(node.all_input_nodes):
            return False
        return call.overload in self._target.views | self._target.joins or self._pads_convolutions(call)

    def _pads_convolutions(self, call: Operation) -> bool:
        """Whether an operator puts zeros around the images that convolutions read."""
        if call.overload not in PADS or call.arguments.get("mode", "constant") != "constant" or call["value"]:
            return False
        readers = [self._calls.get(user) for user in call.node.users]
        spatial = len(call["pad"]) // 2 <= call.node.meta["val"].dim() - 2
        fixed = all(isinstance(size, int) and size >= 0 for size in call["pad"])
        return spatial and fixed and all(reader and reader.overload in CONVOLUTIONS for reader in readers)

    def _complete(self, node: fx.Node) -> bool:
        return bool(node.users) and len(self._wishes.get(node, ())) == len(node.users)

    def _gives_integers(self, call: Operation) -> bool:
        """Whether the result of a carrier becomes integers: for any that reads it so, if its kernel gives no other."""
        result = self._result(call.node)
        closed = call.overload in self._target.closed
        return bool(self._wishes.get(result)) if closed else self._complete(result)

    def _result(self, node: fx.Node) -> fx.Node:
        """Where the value of an operator ends: after the norm and the activation that are computed with it."""
        user = self._fused_with(node)
        if user is not None and self._calls[user].overload in NORMS:
            user = self._fused_with(user) or user
        return user or node

    def _fused_with(self, node: fx.Node) -> fx.Node | None:
        """The norm or activation that is computed with an operator, if one is."""
        target, call = self._target, self._calls.get(node)
        if call is None or len(node.users) != 1:
            return None
        (user,) = node.users
        follows = self._calls.get(user)
        if follows is None or follows.overload not in target.fused or call.overload not in target.computed:
            return None
        return user

    def _sharing(self, readers: dict[fx.Node, tuple[fx.Node, ...]]) -> nx.Graph[fx.Node]:
        """The points, those that must agree linked."""
        linked: nx.Graph[fx.Node] = nx.Graph()
        linked.add_nodes_from(readers)
        for origins in self.joined().values():
            nx.add_path(linked, origins)
        return linked

    def _origins(self, node: fx.Node) -> Iterator[fx.Node]:
        """The points that a value comes from."""
        if not self._passes(node):
            yield node
            return
        for source in node.all_input_nodes:
            if self._is_real(source):
                yield from self._origins(source)

    def _close(self, readers: dict[fx.Node, tuple[fx.Node, ...]], sharing: nx.Graph[fx.Node]) -> None:
        """Adds what a target needs whose integer kernels give integers: points after them, for all readers."""
        through = self._target.views | self._target.joins
        for node in reversed(self._wishes):
            call = self._calls.get(node)
            if call is None or not node.users:
                continue
            sources = [source for source in node.all_input_nodes if self._is_real(source)]
            if not sources or not all(self._reads_integers(node, source, readers) for source in sources):
                continue
            if call.overload in self._target.closed:
                result = self._result(node)
                readers[result] = tuple(result.users)
                sharing.add_node(result)
            elif call.overload in through and node not in self._apart:
                readers[node] = tuple(node.users)
                nx.add_path(sharing, [*sources, node])

    def _reads_integers(self, node: fx.Node, source: fx.Node, readers: dict[fx.Node, tuple[fx.Node, ...]]) -> bool:
        """Whether a point lies between two nodes, or before the padding between them."""
        call = self._calls.get(source)
        if call is not None and call.overload in PADS and self._passes(source):
            return source in readers.get(source.all_input_nodes[0], ())
        return node in readers.get(source, ())

    def _is_real(self, node: fx.Node) -> bool:
        """Whether a node is a float32 tensor that depends on the model's inputs."""
        value = node.meta.get("val")
        return node not in self._constant and isinstance(value, torch.Tensor) and value.dtype == torch.float32
