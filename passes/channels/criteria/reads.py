"""Where channels are read: operands that an operator contracts over a dim of channels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from fxcompress.passes.channels.criteria.totals import carried
from fxcompress.passes.channels.groups import ChannelReport
from fxcompress.passes.channels.layout import Dim
from fxcompress.passes.channels.units import Array
from torch import fx
from torch._ops import OpOverload

from fxcompress.ir.ops import Operation, operation
from fxcompress.ir.program import Program

aten = torch.ops.aten

_DIMS: Mapping[OpOverload, Mapping[str, int]] = {
    aten.conv1d.default: {"input": -2},
    aten.conv1d.padding: {"input": -2},
    aten.conv2d.default: {"input": -3},
    aten.conv2d.padding: {"input": -3},
    aten.conv3d.default: {"input": -4},
    aten.conv3d.padding: {"input": -4},
    aten.conv_transpose1d.default: {"input": -2},
    aten.conv_transpose2d.input: {"input": -3},
    aten.conv_transpose3d.input: {"input": -4},
    aten.linear.default: {"input": -1},
    aten.matmul.default: {"self": -1, "other": -2},
    aten.bmm.default: {"self": -1, "mat2": -2},
    aten.scaled_dot_product_attention.default: {"query": -1, "key": -1},
}
"""Overload -> operand -> the dim that it is contracted over."""


@dataclass(frozen=True, eq=False)
class Read:
    """An operand that is contracted over removable channels.

    Attributes:
        call: The operation.
        operand: Name of the operand.
        dim: The dim, counted from the last.
        units: The units of the elements of that dim, ``(size, k)``.
        split: Sizes that the dim is made of, ``-1`` for positions without units, where their number is not known
            before the run: a batch that is folded into the channels. Elements are then those of the other sizes.
    """

    call: Operation
    operand: str
    dim: int
    units: Array
    split: tuple[int, ...] = ()

    def elements(self, values: torch.Tensor, dim: int) -> torch.Tensor:
        """Values with the elements of a dim as rows, ``(size, rest)``."""
        rows = values.movedim(dim, 0)
        if self.split:
            apart = rows.reshape(*self.split, *rows.shape[1:])
            rows = apart.movedim(self.split.index(-1), len(self.split) - 1).flatten(0, len(self.split) - 2)
        return rows.reshape(len(rows), -1)


def reads(program: Program, report: ChannelReport) -> dict[fx.Node, list[Read]]:
    """The reads of each node that has any, in execution order."""
    found = {}
    for node in program.nodes:
        call = operation(program.graph_module, node)
        if call is not None and call.overload in _DIMS:
            own = list(_reads(call, report))
            if own:
                found[node] = own
    return found


def _reads(call: Operation, report: ChannelReport) -> Iterator[Read]:
    for operand, dim in _DIMS[call.overload].items():
        source = call.operands.get(operand)
        layout = None if source is None else report.layouts.get(source.name)
        if source is None or layout is None:
            continue
        channels: Dim = layout[dim]
        split: tuple[int, ...] = ()
        if not isinstance(source.meta["val"].shape[dim], int):
            channels = tuple(factor for factor in channels if not factor.is_position)
            split = _split(layout[dim])
        units = carried(report, channels)
        if units.shape[1] and split.count(-1) <= 1:
            yield Read(call, operand, dim, units, split)


def _split(dim: Dim) -> tuple[int, ...]:
    """The sizes of a dim's factors, ``-1`` for what is between channels."""
    sizes = [-1 if factor.is_position else factor.size for factor in dim]
    return tuple(size for size, before in zip(sizes, [0, *sizes[:-1]], strict=True) if size != -1 or before != -1)
