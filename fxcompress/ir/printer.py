"""A Program as text: stable, readable, one node a line."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from fxcompress.ir.program import Program

_DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}


def program_text(program: Program) -> str:
    """The graph as text; dynamic sizes are written ``s0, s1, ...`` in order of appearance."""
    symbols: dict[str, str] = {}
    return "\n".join(_line(program, node, symbols) for node in program.nodes) + "\n"


def _line(program: Program, node: fx.Node, symbols: dict[str, str]) -> str:
    operands = ", ".join([*map(_argument, node.args), *(f"{k}={_argument(v)}" for k, v in node.kwargs.items())])
    if node.op == "output":
        return f"return {operands}"
    if node.op == "placeholder":
        call = "input"
    elif node.op == "get_attr":
        call = f"state {node.target}"
    elif node.op == "call_module":
        module = program.graph_module.get_submodule(str(node.target))
        call = f"{node.target}[{type(module).__name__}({module.extra_repr()})]({operands})"
    else:
        call = f"{_target(node.target)}({operands})"
    return f"%{node.name} : {_value(node.meta.get('val'), symbols)} = {call}"


def _target(target: Any) -> str:
    if isinstance(target, OpOverload):
        return str(target).removesuffix(".default")
    return getattr(target, "__name__", repr(target))


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, (list, tuple)):
        inner = ", ".join(map(_argument, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    return str(value) if isinstance(value, (torch.dtype, torch.device)) else repr(value)


def _value(val: Any, symbols: dict[str, str]) -> str:
    if isinstance(val, torch.Tensor):
        shape = ",".join(_size(size, symbols) for size in val.shape)
        return f"{_DTYPES.get(val.dtype, str(val.dtype).removeprefix('torch.'))}[{shape}]"
    if isinstance(val, (list, tuple)):
        return "(" + ", ".join(_value(item, symbols) for item in val) + ")"
    return _size(val, symbols) if isinstance(val, (int, torch.SymInt)) else type(val).__name__


def _size(size: Any, symbols: dict[str, str]) -> str:
    if not isinstance(size, torch.SymInt):
        return str(size)
    expression = size.node.expr
    for symbol in sorted(expression.free_symbols, key=str):
        symbols.setdefault(str(symbol), f"s{len(symbols)}")
    renamed = {symbol: type(symbol)(symbols[str(symbol)], **symbol.assumptions0) for symbol in expression.free_symbols}
    return str(expression.xreplace(renamed)).replace(" ", "")
