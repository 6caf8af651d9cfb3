"""Channel dependency: which elements of which tensors disappear together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from fxcompress.passes.channels import families
from fxcompress.passes.channels.groups import ChannelReport, report
from fxcompress.passes.channels.layout import (
    Algebra,
    Layout,
    Sizes,
    dim_size,
    elements,
    is_position,
    position,
    shape_of,
    value_layout,
)
from fxcompress.passes.channels.permutations import Permutation, permutations
from fxcompress.passes.channels.rules import Call, rule_of
from fxcompress.passes.channels.units import Units
from torch import fx

from fxcompress.ir.ops import Operation, operation
from fxcompress.ir.program import Diagnostic, Program
from fxcompress.pass_base import Analysis
from fxcompress.task import Task

families.load()


@dataclass(frozen=True)
class Channels(Analysis[ChannelReport]):
    """Finds what can be removed together: channels, heads, head dims, groups, experts.

    Parameters start with one unit per element of each dim; one rule per operator says which units are one. What reaches
    inputs, outputs, space, sequence or an operator without a rule stays.
    """

    name: ClassVar[str] = "channels"

    def run(self, program: Program, task: Task | None) -> ChannelReport:
        walk = _Walk(program)
        return report(
            program,
            walk.units,
            {node.name: layout for node, layout in walk.layouts.items() if layout is not None},
            walk.state,
            {node.name: permutation for node, permutation in walk.permutations.items()},
            walk.diagnostics,
        )


class _Walk:
    """One walk over the graph in execution order."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.units = Units()
        self.algebra = Algebra(self.units)
        self.sizes = Sizes()
        self.layouts: dict[fx.Node, Any] = {}
        self.diagnostics: list[Diagnostic] = []
        self.nodes = list(program.nodes)
        self.permutations = permutations(program.graph, self.sizes)
        self.state = self._state_layouts()
        inside = {node for permutation in self.permutations.values() for node in permutation.interior}
        for index, node in enumerate(self.nodes):
            self.algebra.cause = index
            if node not in inside:
                self.layouts[node] = self._layout(node)

    def _state_layouts(self) -> dict[str, Layout]:
        root = self.program.graph_module
        by_tensor: dict[int, Layout] = {}
        named = (*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False))
        for _, tensor in named:
            if id(tensor) not in by_tensor:
                by_tensor[id(tensor)] = tuple(self.algebra.fresh(size) for size in tensor.shape)
        return {name: by_tensor[id(tensor)] for name, tensor in named}

    def _layout(self, node: fx.Node) -> Any:
        if node.op == "output":
            for value in node.args[0]:  # type: ignore[union-attr]
                if isinstance(value, fx.Node) and self.layouts.get(value) is not None:
                    self.algebra.freeze(*self.layouts[value])
            return None
        if node in self.permutations:
            return self._permuted(self.permutations[node])
        if node.op == "get_attr":
            return self.state[str(node.target)]
        call = operation(self.program.graph_module, node)
        if call is not None:
            return self._apply(node, call)
        if node.op == "call_function" and isinstance(self.layouts.get(node.args[0]), list):  # type: ignore[arg-type]
            return self.layouts[node.args[0]][node.args[1]]  # type: ignore[index]
        value = node.meta.get("val")
        return value_layout(value, self.sizes) if isinstance(value, torch.Tensor) else None

    def _apply(self, node: fx.Node, operation_: Any) -> Any:
        call = Call(operation_, self.algebra, self.sizes, self.layouts, self.state)
        values = node.meta.get("val")
        if not isinstance(values, (torch.Tensor, list, tuple)):
            for layout in call.operands():
                self.algebra.freeze(*_read(operation_, layout))
            return None
        found = rule_of(operation_.overload)
        if found is None:
            return self._barrier(
                "unknown-operator", call, "has no dependency rule", "register one with "
                "fxcompress.passes.channels.rules.rule",
            )  # fmt: skip
        result = _specialized(found(call), call.shapes, self.sizes)
        sizes = [shape_of(layout) for layout in _layouts(result)]
        if sizes != call.shapes:
            said = f"has a dependency rule that gives dims of {sizes} where its result has {call.shapes}"
            return self._barrier("wrong-rule", call, said, "mend the rule")
        return result

    def _barrier(self, code: str, call: Call, said: str, remedy: str) -> Any:
        """Keeps all that reaches a call, and says why."""
        message = f"{call.operation.overload} {said}, so everything that reaches it is kept; {remedy}"
        self.diagnostics.append(Diagnostic(code, message, call.operation.node.name))
        return call.barrier()

    def _permuted(self, permutation: Permutation) -> Layout:
        layout: Layout = self.layouts[permutation.source]
        if is_position(layout[permutation.dim]):
            return layout
        units = self.algebra.flat(layout[permutation.dim])[permutation.index]
        return (*layout[: permutation.dim], elements(units), *layout[permutation.dim + 1 :])


def _layouts(result: Any) -> list[Layout]:
    """The layouts that a rule gives, without what stands for a result that is no tensor."""
    return [layout for layout in (result if isinstance(result, list) else [result]) if layout is not None]


def _specialized(result: Any, shapes: list[tuple[int, ...]], sizes: Sizes) -> Any:
    """What a rule gives, with the constants that torch.export found sizes to be after it had recorded the operands'.

    An image that has become one pixel may be of a size that depends on the input before a layer, and of 1 after it.
    """
    if isinstance(result, list):
        given = iter(shapes)
        return [None if layout is None else _specialized(layout, [next(given, ())], sizes) for layout in result]
    if result is None or [len(result)] != [len(shape) for shape in shapes]:
        return result
    return tuple(
        position(size) if is_position(dim) and sizes.stands_for(dim_size(dim)) and not sizes.stands_for(size) else dim
        for dim, size in zip(result, shapes[0], strict=True)
    )


def _read(operation_: Operation, layout: Layout) -> Layout:
    """The dims that a number depends on, which an operation makes of a tensor."""
    return (layout[operation_["dim"]],) if operation_.overload is torch.ops.aten.sym_size.int else layout
