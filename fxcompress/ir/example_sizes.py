"""Concrete sizes for symbolic shapes: one sample of the example inputs."""

from __future__ import annotations

from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx
from torch.utils._pytree import tree_map

from fxcompress.ir.program import Program


class ExampleSizes:
    """Sizes of a Program's tensors for one sample.

    A dynamic batch is 1; any other dynamic size, and a fixed batch, is that of the example inputs. A size that depends
    on data has no example and is 1 as well.
    """

    def __init__(self, program: Program) -> None:
        self._known: dict[sympy.Basic, sympy.Integer] = {}
        interface = program.interface
        inputs = [node.meta.get("val") for node in program.nodes if node.op == "placeholder"]
        for index, (symbolic, example) in enumerate(zip(inputs, interface.leaves, strict=True)):
            if not isinstance(symbolic, torch.Tensor):
                self._learn(symbolic, example)
                continue
            for dim, (size, length) in enumerate(zip(symbolic.shape, example.shape, strict=True)):
                self._learn(size, 1 if interface.batch.get(index) == dim else length)

    def _learn(self, symbolic: Any, size: Any) -> None:
        if isinstance(symbolic, torch.SymInt) and symbolic.node.expr.is_Symbol:
            self._known.setdefault(symbolic.node.expr, sympy.Integer(size))

    def size(self, size: int | torch.SymInt) -> int:
        """The concrete value of a size."""
        if not isinstance(size, torch.SymInt):
            return size
        expression = size.node.expr
        return int(expression.xreplace({s: self._known.get(s, sympy.Integer(1)) for s in expression.free_symbols}))

    def shape(self, tensor: torch.Tensor) -> tuple[int, ...]:
        """The concrete shape of a (fake) tensor."""
        return tuple(self.size(size) for size in tensor.shape)

    def shapes(self, values: Any) -> Any:
        """``values`` with every tensor, and every node that stands for one, replaced by its shape."""
        return tree_map(self._shape_of, values, is_leaf=lambda value: isinstance(value, fx.Node))

    def _shape_of(self, value: Any) -> Any:
        known = value.meta.get("val") if isinstance(value, fx.Node) else value
        return self.shape(known) if isinstance(known, torch.Tensor) else known
