"""What a Program would cost with a choice of units removed, without removing them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from fxcompress.passes.channels.elements import Survivors
from fxcompress.passes.channels.groups import ChannelReport
from fxcompress.passes.channels.layout import Layout
from fxcompress.passes.channels.units import Mask
from torch import fx
from torch.utils._pytree import tree_leaves

from fxcompress.ir.example_sizes import ExampleSizes
from fxcompress.ir.macs import RULES, Rule, Shape, ShapedCall
from fxcompress.ir.ops import Operation, operations
from fxcompress.ir.program import Program


@dataclass(frozen=True, eq=False)
class _Tensor:
    """A tensor in a call: its shape before removal, and what its dims are made of."""

    shape: Shape
    layout: Layout | None

    def after(self, survivors: Survivors | None) -> Shape:
        if survivors is None or self.layout is None:
            return self.shape
        return tuple(map(survivors.shrunk, self.shape, self.layout))


@dataclass(frozen=True, eq=False)
class _Call:
    """A call that multiplies: its plain arguments, and those that hold tensors."""

    rule: Rule
    plain: Mapping[str, Any]
    tensors: Mapping[str, _Tensor | list[_Tensor]]
    output: _Tensor

    def macs(self, survivors: Survivors | None) -> int:
        shapes = {
            name: [each.after(survivors) for each in value] if isinstance(value, list) else value.after(survivors)
            for name, value in self.tensors.items()
        }
        return self.rule(ShapedCall({**self.plain, **shapes}, self.output.after(survivors)))


class Price:
    """Multiply-accumulates of a Program, as the analysis ``cost`` counts them, under any choice of units.

    Args:
        program: The Program.
        report: Its channel dependencies.
    """

    def __init__(self, program: Program, report: ChannelReport) -> None:
        self._report = report
        self._sizes = ExampleSizes(program)
        self._calls = [self._call(call) for call in operations(program.graph_module, RULES)]

    @cached_property
    def whole(self) -> int:
        """The MACs before anything is removed."""
        return sum(call.macs(None) for call in self._calls)

    def macs(self, removed: Mask) -> int:
        """The MACs that stay."""
        survivors = self._report.survivors(removed)
        return sum(call.macs(survivors) for call in self._calls)

    def saved(self, unit: int) -> int:
        """The MACs that go with a unit alone."""
        return self.whole - self.macs(self._report.removed_mask([unit]))

    def _call(self, call: Operation) -> _Call:
        plain, tensors = {}, {}
        for name, value in call.arguments.items():
            found = self._tensors(call, name, value)
            if found is None:
                plain[name] = value
            else:
                tensors[name] = found
        return _Call(RULES[call.overload], plain, tensors, self._value(call.node))

    def _tensors(self, call: Operation, name: str, value: Any) -> _Tensor | list[_Tensor] | None:
        if name in call.state:
            return _Tensor(tuple(value.shape), self._report.state[call.state[name]])
        if _is_tensor(value):
            return self._value(value)
        if isinstance(value, (list, tuple)) and any(map(_is_tensor, value)):
            return [self._value(each) for each in value]
        return None

    def _value(self, node: fx.Node) -> _Tensor:
        """A node's (first) value."""
        layout = self._report.layouts.get(node.name)
        first = layout[0] if isinstance(layout, list) else layout
        return _Tensor(self._sizes.shape(tree_leaves(node.meta["val"])[0]), first)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor)
