"""Where channels are read: operands that an operator contracts over a dim of channels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from fxcompress.passes.channels.criteria.totals import carried
from fxcompress.passes.channels.groups import ChannelReport
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
    """

    call: Operation
    operand: str
    dim: int
    units: Array


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
        layout = report.layouts.get(call.operands[operand].name) if operand in call.operands else None
        if layout is not None:
            units = carried(report, layout[dim])
            if units.shape[1]:
                yield Read(call, operand, dim, units)
