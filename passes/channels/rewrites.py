"""The registry of rewrites: what removal changes in a call besides its parameters.

Most operators need nothing: their shapes follow from their operands. A rewrite is registered where a call spells a
size, a bound or a number of groups, or a constant that follows from one:

    from fxcompress.passes.channels.rewrites import Edit, rewrite

    @rewrite(torch.ops.mine.tile_channels.default)
    def tile_channels(edit: Edit) -> None:
        edit.set("channels", edit.count(edit.result[1]))
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from fxcompress.passes.channels.elements import Survivors
from fxcompress.passes.channels.groups import ChannelReport
from fxcompress.passes.channels.layout import Dim, Layout
from fxcompress.passes.channels.rules import name_of
from fxcompress.passes.channels.units import Mask
from torch import fx
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

from fxcompress.errors import InputError, VerificationError
from fxcompress.ir.ops import Operation, argument_names, free_name, set_state
from fxcompress.ir.program import CONSTANTS

Rewrite = Callable[["Edit"], None]


@dataclass(frozen=True)
class Edit:
    """One call of an operator, as its rewrite sees it: sizes before and after, and ways to change the call.

    Attributes:
        operation: The call as it was.
        report: The analysis that removal follows.
        survivors: What stays.
        root: The module that holds the graph.
    """

    operation: Operation
    report: ChannelReport
    survivors: Survivors
    root: fx.GraphModule

    @property
    def node(self) -> fx.Node:
        return self.operation.node

    def __getitem__(self, name: str) -> Any:
        return self.operation[name]

    def operand(self, name: str) -> Any:
        """An argument as it stands in the call: a node also where it reads a parameter."""
        return self.operation.operand(name)

    def layout(self, name: str) -> Layout:
        """The layout, before removal, of a tensor argument."""
        if name in self.operation.state:
            return self.report.state[self.operation.state[name]]
        found: Layout = self.report.layouts[self.operation[name].name]
        return found

    @property
    def result(self) -> Layout:
        """The layout of the only result."""
        found: Layout = self.report.layouts[self.node.name]
        return found

    @property
    def results(self) -> list[Layout]:
        """The layouts of several results."""
        found: list[Layout] = self.report.layouts[self.node.name]
        return found

    def kept(self, dim: Dim) -> Mask | None:
        """Which elements of a dim stay; ``None`` where all do."""
        return self.survivors.dim(dim)

    def shrinks(self, *dims: Dim) -> bool:
        """Whether any element of any of these dims goes."""
        return self.survivors.shrinks(*dims)

    def count(self, dim: Dim) -> int:
        """How many elements of a dim stay."""
        return math.prod(map(self.survivors.size, dim))

    def size(self, dim: Dim, old: Any) -> Any:
        """A size argument after removal, as a number or as a node computed from the old one."""
        if not self.shrinks(dim) or (isinstance(old, int) and old < 0):
            return old
        if isinstance(old, int):
            return self.count(dim)
        return scaled_size(self.node, old, *self.ratio(dim))

    def ratio(self, dim: Dim) -> tuple[int, int]:
        """Sizes before and after of the factors of a dim that shrink."""
        return self.survivors.ratio(dim)

    def rows(self, dim: Dim, outer: int) -> int:
        """How many of ``outer`` equal runs of a dim stay (groups of channels); those that do must stay equal.

        Raises:
            VerificationError: The runs that stay are of different sizes.
        """
        kept = self.kept(dim)
        if kept is None:
            return outer
        counts = kept.reshape(outer, -1).sum(1)
        if len(np.unique(counts[counts > 0])) > 1:
            raise VerificationError(f"{self.node.name} would keep groups of {sorted(set(counts.tolist()))} channels")
        return int((counts > 0).sum())

    def set(self, name: str, value: Any) -> None:
        """Gives the call another argument, or its module another attribute."""
        if self.operation.module is not None:
            setattr(self.operation.module, name, tuple(value) if isinstance(value, list) else value)
            return
        place = argument_names(self.operation.overload).index(name)
        if place < len(self.node.args):
            self.node.update_arg(place, value)
        else:
            self.node.update_kwarg(name, value)

    def constant(self, values: torch.Tensor) -> fx.Node:
        """A read, before the call, of a new constant."""
        return read_constant(self.root, self.node, values)

    def replace(self, overload: OpOverload, *args: Any) -> None:
        """Makes the call one of another operator."""
        self.node.target, self.node.args, self.node.kwargs = overload, args, {}


_REWRITES: dict[str, Rewrite] = {}


def rewrite(*overloads: OpOverload | str) -> Callable[[Rewrite], Rewrite]:
    """Registers a function as the rewrite of some overloads.

    Args:
        overloads: Overloads, or their names where the library that defines them may not be installed.

    Raises:
        InputError: One of them has a rewrite already.
    """

    def register(function: Rewrite) -> Rewrite:
        for overload in overloads:
            name = overload if isinstance(overload, str) else name_of(overload)
            if name in _REWRITES:
                raise InputError(f"{name} has a rewrite already: {_REWRITES[name].__qualname__}")
            _REWRITES[name] = function
        return function

    return register


def rewrite_of(overload: OpOverload) -> Rewrite | None:
    """The rewrite of an overload, ``None`` where it needs none."""
    return _REWRITES.get(name_of(overload))


def read_constant(root: fx.GraphModule, node: fx.Node, values: torch.Tensor) -> fx.Node:
    """A read, placed before a node, of a new constant named after it."""
    fake = next(value for value in tree_leaves(node.meta["val"]) if isinstance(value, torch.Tensor))
    name = f"{CONSTANTS}.{free_name(root, CONSTANTS, node.name)}"
    set_state(root, name, values.to(fake.device), persistent=False)
    with root.graph.inserting_before(node):
        read = root.graph.get_attr(name)
    read.meta["val"] = fake.new_empty(values.shape, dtype=values.dtype)
    return read


def scaled_size(before: fx.Node, size: fx.Node, old: int, new: int) -> fx.Node:
    """A node for ``size // old * new``, placed before another."""
    graph = before.graph
    with graph.inserting_before(before):
        whole = graph.call_function(operator.floordiv, (size, old))
        whole.meta["val"] = size.meta["val"] // old
        if new == 1:
            return whole
        scaled = graph.call_function(operator.mul, (whole, new))
        scaled.meta["val"] = whole.meta["val"] * new
    return scaled
