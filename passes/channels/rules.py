"""The registry of dependency rules: for each operator overload, one function that relates its operands and results.

A rule reads the layouts of the operands from its :class:`Call`, states which elements disappear together, and returns
the layout of the result (a list of layouts for several results). An operator of your own takes a few lines:

    from fxcompress.passes.channels.layout import Layout
    from fxcompress.passes.channels.rules import Call, rule

    @rule(torch.ops.mine.scale_channels.default)
    def scale_channels(call: Call) -> Layout:
        x, scale = call.layout("x"), call.layout("scale")
        call.join(x[1], scale[0])      # channel i of x goes together with entry i of scale
        return x

Operators that PyTorch tags as pointwise have a rule already. Any other operator without a rule is a barrier: everything
that reaches it is kept, and a diagnostic names it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fxcompress.passes.channels.layout import Algebra, Dim, Layout, Sizes, broadcast, position
from torch import fx
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

from fxcompress.errors import InputError
from fxcompress.ir.constants import is_constant_state
from fxcompress.ir.ops import Operation, get_state

Result = Layout | list[Layout]
Rule = Callable[["Call"], Result]


@dataclass(frozen=True)
class Call:
    """One call of an operator, as its rule sees it.

    Attributes:
        operation: The call with its arguments by name.
        algebra: States equations and splits dims.
        sizes: Numbers that stand for symbolic sizes.
        layouts: Layouts of what earlier nodes computed and of state, by node.
        state: Layouts of parameters and buffers, by qualified name.
    """

    operation: Operation
    algebra: Algebra
    sizes: Sizes
    layouts: dict[fx.Node, Any]
    state: dict[str, Layout]

    def __getitem__(self, name: str) -> Any:
        return self.operation[name]

    def layout(self, name: str) -> Layout:
        """The layout of a tensor argument."""
        if name in self.operation.state:
            return self.state[self.operation.state[name]]
        found: Layout = self.layouts[self.operation[name]]
        return found

    def given(self, name: str) -> bool:
        """Whether an optional argument is there."""
        return self.operation[name] is not None

    def tensors(self, name: str) -> list[Layout]:
        """The layouts of a list of tensors."""
        return [self.layouts[node] for node in self.operation[name]]

    def constant(self, value: Any) -> torch.Tensor | None:
        """The tensor that an argument reads, if it is state that is neither trained nor saved and has a value."""
        root = self.operation.node.graph.owning_module
        assert root is not None
        if not isinstance(value, fx.Node) or value.op != "get_attr" or not is_constant_state(root, str(value.target)):
            return None
        found = get_state(root, str(value.target))
        return None if found.is_meta else found

    def operand(self, name: str) -> Any:
        """An argument as it stands in the call: a node also where it reads a parameter."""
        return self.operation.operand(name)

    def operands(self) -> list[Layout]:
        """The layouts of all tensor arguments, in order."""
        found = []
        for name, value in self.operation.arguments.items():
            if name in self.operation.state:
                found.append(self.layout(name))
            else:
                nodes = [leaf for leaf in tree_leaves(value) if isinstance(leaf, fx.Node)]
                found += [self.layouts[node] for node in nodes if self.layouts.get(node) is not None]
        return found

    def size(self, value: Any) -> int:
        """The number for a size argument, which may be a node."""
        return self.sizes(value.meta["val"] if isinstance(value, fx.Node) else value)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of the results."""
        values = tree_leaves(self.operation.node.meta["val"])
        return [self.sizes.shape(value) for value in values if isinstance(value, torch.Tensor)]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the only result."""
        return self.shapes[0]

    def fresh(self, size: int) -> Dim:
        """A dim of new units."""
        return self.algebra.fresh(size)

    def join(self, a: Dim, b: Dim) -> None:
        """States that element ``i`` of ``a`` disappears exactly when element ``i`` of ``b`` does."""
        self.algebra.join(a, b)

    def keep(self, *dims: Dim) -> None:
        """States that no element of these dims may disappear."""
        self.algebra.freeze(*dims)

    def positions(self, index: int = 0) -> Layout:
        """The layout of a result that nothing can be removed from."""
        return tuple(position(size) for size in self.shapes[index])

    def barrier(self) -> Result:
        """Keeps everything in all operands; the results are positions."""
        for layout in self.operands():
            self.keep(*layout)
        results = [self.positions(index) for index in range(len(self.shapes))]
        return results[0] if isinstance(self.operation.node.meta["val"], torch.Tensor) else results


_RULES: dict[str, Rule] = {}


def rule(*overloads: OpOverload | str) -> Callable[[Rule], Rule]:
    """Registers a function as the rule of some overloads.

    Args:
        overloads: Overloads, or their names (``mine::scale_channels``) where the library that defines them may not be
            installed.

    Raises:
        InputError: One of them has a rule already.
    """

    def register(function: Rule) -> Rule:
        for overload in overloads:
            name = overload if isinstance(overload, str) else name_of(overload)
            if name in _RULES:
                raise InputError(f"{name} has a rule already: {_RULES[name].__qualname__}")
            _RULES[name] = function
        return function

    return register


def name_of(overload: OpOverload) -> str:
    """The name that an overload is registered under (``mine::scale_channels``, ``aten::add.Tensor``)."""
    return str(overload.name())  # type: ignore[no-untyped-call]


def rule_of(overload: OpOverload) -> Rule | None:
    """The rule of an overload, ``None`` where it has none."""
    found = _RULES.get(name_of(overload))
    if found is None and torch.Tag.pointwise in overload.tags:
        return pointwise
    return found


def pointwise(call: Call) -> Layout:
    """Element i of the result depends on element i of each operand alone."""
    return broadcast(call.algebra, call.operands())


def normalized_dim(dim: int, rank: int) -> int:
    """A dim counted from the front."""
    return dim % rank if rank else 0


def replaced(layout: Layout, dims: dict[int, Dim]) -> Layout:
    """A layout with other dims in some places."""
    return tuple(dims.get(index, dim) for index, dim in enumerate(layout))


def dropped(layout: Layout, dims: Sequence[int], keepdim: bool = False) -> Layout:
    """A layout without some dims, or with size 1 in their place."""
    gone = {normalized_dim(dim, len(layout)) for dim in dims}
    if keepdim:
        return replaced(layout, dict.fromkeys(gone, ()))
    return tuple(dim for index, dim in enumerate(layout) if index not in gone)
