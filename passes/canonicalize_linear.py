"""Writes products with a stored matrix as linear layers, which other passes know how to compress."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn
from torch._ops import OpOverload

from fxcompress.ir.dead_code import drop_unread_state, eliminate_dead
from fxcompress.ir.lowering import read_state
from fxcompress.ir.ops import Operation, free_name, get_module, operations, readers, set_state
from fxcompress.ir.program import Program
from fxcompress.pass_base import Guarantee, PassResult, Refusal, Transform
from fxcompress.task import Task

aten = torch.ops.aten

_PRODUCTS: Mapping[OpOverload, tuple[str, str]] = {
    aten.addmm.default: ("mat1", "mat2"),
    aten.mm.default: ("self", "mat2"),
    aten.matmul.default: ("self", "other"),
}
"""Operator -> its two factors; ``addmm`` adds ``self``."""


@dataclass(frozen=True)
class CanonicalizeLinear(Transform):
    """Writes ``x @ W`` and ``x @ W + b``, with W of the model's state, as linear layers with the transposed weight.

    GPT-2's layers are such products. The weight gets a new name, with ``_transposed`` at its end, so that a state dict
    of the layout before is not taken for one of the layout after. Refuses, naming the node: ``shared-weight``,
    ``scaled-sum``, ``broadcast-bias``.
    """

    name: ClassVar[str] = "canonicalize-linear"
    guarantee: ClassVar[Guarantee] = "exact"

    def run(self, program: Program, task: Task | None) -> PassResult:
        """Counts the linear layers ``written``."""
        root = program.graph_module
        refusals = tuple(_refusals(root))
        refused = {refusal.node for refusal in refusals}
        products = [call for call in _products(root) if call.node.name not in refused]
        names: dict[int, str] = {}
        for call in products:
            weight = _matrix(call)
            if id(weight) not in names:
                names[id(weight)] = _put_transposed(root, call.state[_PRODUCTS[call.overload][1]], weight)
            _write(root, call, names[id(weight)])
        if products:
            eliminate_dead(program.graph)
            drop_unread_state(root)
        return PassResult(bool(products), refusals, {"written": len(products)})


def _products(root: fx.GraphModule) -> Iterator[Operation]:
    """Products of a value and a matrix of the model's state."""
    for call in operations(root, _PRODUCTS):
        value, matrix = _PRODUCTS[call.overload]
        if matrix in call.state and call[matrix].dim() == 2 and value in call.operands:
            yield call


def _refusals(root: fx.GraphModule) -> Iterator[Refusal]:
    products, read_by = list(_products(root)), readers(root)
    objections = {call.node: objection for call in products if (objection := _objection(call)) is not None}
    written = {call.node for call in products} - objections.keys()
    for call in products:
        if call.node in objections:
            code, reason = objections[call.node]
            yield Refusal(code, call.node.name, reason)
        elif not written.issuperset(read_by[id(_matrix(call))]):
            reason = "another call reads its weight as it is, and a transposed copy would be trained apart"
            yield Refusal("shared-weight", call.node.name, reason)


def _objection(call: Operation) -> tuple[str, str] | None:
    """Code and reason of a refusal that has nothing to do with other calls."""
    if call.overload is not aten.addmm.default:
        return None
    if (call["beta"], call["alpha"]) != (1, 1):
        return "scaled-sum", "beta or alpha is not 1; scale the weight and the bias instead"
    if call.operand("self").meta["val"].shape != _matrix(call).shape[1:]:
        return "broadcast-bias", "what it adds is not one value for each output"
    return None


def _matrix(call: Operation) -> torch.Tensor:
    found: torch.Tensor = call[_PRODUCTS[call.overload][1]]
    return found


def _put_transposed(root: fx.GraphModule, name: str, weight: torch.Tensor) -> str:
    """Puts the transposed weight beside the one of that name, saved or not as that is; gives its name."""
    turned: torch.Tensor = weight.detach().t().contiguous()
    if isinstance(weight, nn.Parameter):
        turned = nn.Parameter(turned, requires_grad=weight.requires_grad)
    path, _, leaf = name.rpartition(".")
    new = f"{path}.{free_name(root, path, f'{leaf}_transposed')}".lstrip(".")
    set_state(root, new, turned, persistent=leaf not in get_module(root, path)._non_persistent_buffers_set)
    return new


def _write(root: fx.GraphModule, call: Operation, weight: str) -> None:
    """Makes a linear layer of the call, in place."""
    value = call.operand(_PRODUCTS[call.overload][0])
    bias = call.operand("self") if call.overload is aten.addmm.default else None
    call.node.args, call.node.kwargs = (value, read_state(root, weight, call.node), bias), {}
    call.node.target = aten.linear.default
