"""A Program in float64: every weight, constant, literal dtype and example input widened.

An exact rewrite of the widened Program must agree to float64 rounding, which no real error hides under.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves, tree_map

from fxcompress.analysis import invalidate
from fxcompress.ir.ops import argument_names, bind, replace_state
from fxcompress.ir.program import Program

_WIDER = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex64: torch.complex128,
}


def widened(program: Program) -> Program:
    """A float64 copy of a Program; integers and booleans stay as they are."""
    wide = program.copy()
    root = wide.graph_module
    for tensor in {id(t): t for t in (*root.parameters(), *root.buffers())}.values():
        if tensor.dtype in _WIDER:
            replace_state(root, tensor, _wide_state(tensor))
    for node in wide.nodes:
        node.args, node.kwargs = tree_map(_wide, node.args), tree_map(_wide, node.kwargs) | _created_dtype(node)
        if "val" in node.meta:
            node.meta["val"] = tree_map(_wide, node.meta["val"])
    root.recompile()
    interface = program.interface
    args, kwargs = tree_map(_wide, (interface.args, interface.kwargs))
    wide.interface = replace(interface, args=args, kwargs=kwargs)
    invalidate(wide, ())
    return wide


def _created_dtype(node: fx.Node) -> dict[str, Any]:
    """The dtype of a tensor that is made of sizes alone and takes the default one."""
    if not isinstance(node.target, OpOverload) or "dtype" not in argument_names(node.target):
        return {}
    reads = (value for source in node.all_input_nodes for value in tree_leaves(source.meta.get("val")))
    if any(isinstance(value, torch.Tensor) for value in reads):
        return {}
    given, made = bind(node.target, node.args, node.kwargs)["dtype"], node.meta["val"].dtype
    return {"dtype": _WIDER[made]} if given is None and made in _WIDER else {}


def _wide_state(tensor: torch.Tensor) -> torch.Tensor:
    value = tensor.detach().to(_WIDER[tensor.dtype])
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def _wide(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(_WIDER.get(value.dtype, value.dtype))
    return _WIDER.get(value, value) if isinstance(value, torch.dtype) else value
