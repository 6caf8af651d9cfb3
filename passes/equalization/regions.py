"""Regions: parts of a graph through which factors for channels go unchanged, and the layers around them.

The factors come in with the layers that make the channels, and go out with those that read them. Which channels of
which values are one is what the analysis ``channels`` knows: elements that carry the same units have one factor, so
residual streams, concatenation and several readers need no case of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from fxcompress.passes.channels.groups import ChannelReport
from fxcompress.passes.channels.layout import Dim, Factor
from fxcompress.passes.channels.units import NONE, Array
from fxcompress.passes.equalization.operators import CONTRACTIONS, JOINTS, NORMS, PRODUCTS, SCALED, bounds
from torch import fx
from torch.utils._pytree import tree_leaves

from fxcompress.ir.ops import Operation, operation
from fxcompress.ir.program import Program
from fxcompress.ir.weighted import weighted_layer

aten = torch.ops.aten

Key = tuple[int, ...]
"""The units that an element carries: those of one key have one factor."""


@dataclass(frozen=True)
class Side:
    """A layer at the edge of a region.

    Attributes:
        node: Its call.
        value: What it gives, or what it reads.
        dim: The dim of that value that the channels are in.
        keys: The key of each channel.
    """

    node: fx.Node
    value: fx.Node
    dim: int
    keys: tuple[Key, ...]


@dataclass(eq=False)
class Region:
    """Values whose channels share factors.

    Attributes:
        makers: Layers that make them.
        readers: Layers that read them.
        clamps: Clamps that need a bound for each channel.
        objections: Code, node and reason for each thing that lets no factors through.
    """

    makers: list[Side] = field(default_factory=list)
    readers: list[Side] = field(default_factory=list)
    clamps: list[Side] = field(default_factory=list)
    objections: list[tuple[str, fx.Node, str]] = field(default_factory=list)

    @property
    def keys(self) -> list[Key]:
        """Every key that its makers have, in order, each once."""
        return list(dict.fromkeys(key for side in self.makers for key in side.keys))


class Regions:
    """Finds the regions of a Program, each once, in the order of their readers.

    Args:
        program: The Program.
        report: Its channels.
    """

    def __init__(self, program: Program, report: ChannelReport) -> None:
        self._root, self._report = program.graph_module, report
        self._calls = {node: operation(self._root, node) for node in program.nodes}
        self._known: set[fx.Node] = set()

    def __iter__(self) -> Iterator[Region]:
        for call in self._calls.values():
            layer = weighted_layer(call) if call is not None else None
            source = layer.operation.operands.get("input") if layer is not None else None
            if source is not None and source not in self._known:
                region = self._around(source)
                if region.makers and region.readers:
                    yield region

    def _around(self, source: fx.Node) -> Region:
        region, waiting = Region(), [source]
        while waiting:
            node = waiting.pop()
            if node not in self._known:
                self._known.add(node)
                waiting += self._before(region, node)
                for user in node.users:
                    waiting += self._after(region, node, user)
        self._check_keys(region)
        return region

    def _before(self, region: Region, node: fx.Node) -> list[fx.Node]:
        """What else is in a region because ``node`` is; notes the maker, or what is in the way."""
        call = self._calls[node]
        dim = None if call is None else self._made_dim(call)
        if dim is not None:
            self._add(region, region.makers, node, node, dim)
            return []
        limits = None if call is None else bounds(call)
        if limits is not None and any(map(_moves, limits)):
            self._add(region, region.clamps, node, node, self._only_dim(node))
        sources = self._scaled(node)
        if sources is None:
            region.objections.append(("no-factor", node, f"{_shown(node)} gives no multiple for a multiple"))
        return sources or []

    def _after(self, region: Region, node: fx.Node, user: fx.Node) -> list[fx.Node]:
        """What else is in a region because it reads ``node``; notes the reader, or what is in the way."""
        call = self._calls[user]
        dim = None if call is None else self._read_dim(call, node)
        if dim is not None:
            self._add(region, region.readers, user, node, dim)
            return []
        made = tree_leaves(user.meta.get("val"))
        if user.op != "output" and not any(isinstance(leaf, torch.Tensor) for leaf in made):
            return []  # sizes; integers may follow from values, as those of argmax do
        if node in (self._scaled(user) or ()):
            return [user]
        region.objections.append(("no-factor", user, f"{_shown(user)} gives no multiple for a multiple of {node.name}"))
        return []

    def _made_dim(self, call: Operation) -> int | None:
        """The dim of a result whose channels a layer's own state can scale."""
        layer = weighted_layer(call)
        if layer is not None:
            return layer.layout.channel_dim(call.node.meta["val"].dim())
        if call.overload in NORMS and call.parameter("weight") is not None and call["weight"].dim() == 1:
            return int(NORMS[call.overload] % call.node.meta["val"].dim())
        return gain_dim(call)

    def _read_dim(self, call: Operation, node: fx.Node) -> int | None:
        """The dim of an operand whose channels a layer's own state can scale."""
        if [name for name, operand in call.operands.items() if operand is node] == ["input"]:
            layer = weighted_layer(call)
            return None if layer is None else layer.layout.channel_dim(node.meta["val"].dim())
        made = call.node.meta.get("val")  # sizes, and several values, have no dims
        return gain_dim(call) if isinstance(made, torch.Tensor) and made.dim() == node.meta["val"].dim() else None

    def _scaled(self, node: fx.Node) -> list[fx.Node] | None:
        """The operands that must have the factors for ``node`` to have them; ``None`` if it cannot."""
        if node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor) and self._calls[node] is None:
            return node.all_input_nodes[:1]  # an item of several results
        call = self._calls[node]
        if call is None:
            return None
        if bounds(call) is not None:
            return [call.operands["self"]]
        if call.overload in SCALED:
            given = [call.arguments[name] for name in SCALED[call.overload] if name in call.arguments]
            leaves = tree_leaves(given)
            able = all(isinstance(leaf, fx.Node) and _is_float(leaf) and self._keeps(call, leaf) for leaf in leaves)
            return leaves if able else None
        if call.overload in PRODUCTS:
            operands = [call.operands[name] for name in PRODUCTS[call.overload] if name in call.operands]
            likely = [each for each in operands if self._can_have(each) and self._keeps(call, each)]
            return likely[:1] or None
        return None

    def _can_have(self, node: fx.Node) -> bool:
        call = self._calls[node]
        if not _is_float(node) or call is None:
            return False
        return (
            bounds(call) is not None
            or call.overload in SCALED
            or call.overload in PRODUCTS
            or self._made_dim(call) is not None
        )

    def _keeps(self, call: Operation, operand: fx.Node) -> bool:
        """Whether an operator mixes no channels of an operand, and spreads it over no others."""
        own, made = self._units(operand), self._units(call.node)
        if call.overload in CONTRACTIONS:
            return own <= made
        return call.overload not in JOINTS or own == made

    def _units(self, node: fx.Node) -> set[int]:
        layout: Any = self._report.layouts.get(node.name) or ()
        parts = layout if isinstance(layout, list) else [layout]
        return {unit for part in parts for dim in part for unit in self._units_in(dim)}

    def _units_in(self, dim: Dim) -> set[int]:
        """The units that any element of a dim carries."""
        found = (self._held(factor) for factor in dim if factor.units is not None)
        return {unit for rows in found for unit in rows.flatten().tolist()} - {NONE}

    def _held(self, factor: Factor) -> Array:
        """The units of each element of a factor, those that may not be removed included; no columns for a position."""
        place = self._report.elements.place(factor)
        if place is None:
            return np.empty((factor.size, 0), np.int64)
        return self._report.elements.held[self._report.elements.inside(place)]

    def _rows(self, dim: Dim) -> Array:
        """The units of each element of a dim, which is a product of factors."""
        rows: Array = np.empty((1, 0), np.int64)
        for factor in dim:
            inner = self._held(factor)
            rows = np.concatenate([np.repeat(rows, len(inner), axis=0), np.tile(inner, (len(rows), 1))], axis=1)
        return rows

    def _only_dim(self, node: fx.Node) -> int:
        """The dim of a value that channels are in; the first of several, which :meth:`_keys` then objects to."""
        layout: Any = self._report.layouts.get(node.name) or ()
        return next((index for index, dim in enumerate(layout) if self._units_in(dim)), 0)

    def _add(self, region: Region, sides: list[Side], node: fx.Node, value: fx.Node, dim: int) -> None:
        keys = self._keys(value, dim)
        if keys is None:
            region.objections.append(("channels", node, f"its channels are not in dim {dim} of {value.name} alone"))
        else:
            sides.append(Side(node, value, dim, keys))

    def _keys(self, value: fx.Node, dim: int) -> tuple[Key, ...] | None:
        """The key of each channel; ``None`` if one has none, or another dim carries the same units."""
        layout: Any = self._report.layouts.get(value.name)
        if layout is None or not isinstance(value.meta["val"].shape[dim], int):
            return None
        keys = tuple(tuple(sorted(set(row) - {NONE})) for row in self._rows(layout[dim]).tolist())
        units = {unit for key in keys for unit in key}
        clash = any(units & self._units_in(each) for index, each in enumerate(layout) if index != dim)
        return keys if all(keys) and not clash else None

    def _check_keys(self, region: Region) -> None:
        made = set(region.keys)
        for side in region.readers:
            if not made.issuperset(side.keys):
                reason = "it reads channels that are no channels of the layers before it, one by one"
                region.objections.append(("channels", side.node, reason))


def gain_dim(call: Operation) -> int | None:
    """The dim that a product with a vector of the model's state scales: LayerScale, or the weight of an RMSNorm."""
    if call.overload is not aten.mul.Tensor or len(call.state) != 1 or len(call.operands) != 1:
        return None
    (name,) = call.state
    tensor, rank = call[name], call.node.meta["val"].dim()
    wide = [index - tensor.dim() for index, size in enumerate(tensor.shape) if size != 1]
    return wide[0] + rank if len(wide) == 1 and tensor.dim() <= rank else None


def _moves(bound: float) -> bool:
    """Whether a bound is another one for a multiple."""
    return bound != 0 and math.isfinite(bound)


def _is_float(node: fx.Node) -> bool:
    values = tree_leaves(node.meta.get("val"))
    return bool(values) and all(isinstance(value, torch.Tensor) and value.is_floating_point() for value in values)


def _shown(node: fx.Node) -> str:
    return f"{node.name} ({node.target})"
