"""The graph of a Program as data; what each node gives is worked out again when it is read."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._sympy.numbers import int_oo

from fxcompress.artifact.modules import checked_path
from fxcompress.artifact.values import Decoder, decode_target, encode, encode_target
from fxcompress.ir.marks import DONE
from fxcompress.ir.program import graph_module_of


def encode_graph(graph: fx.Graph) -> list[dict[str, Any]]:
    """One entry a node: name, operation, target, operands, and where in the source it comes from."""
    return [_encode_node(node) for node in graph.nodes]


def _encode_node(node: fx.Node) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": node.name,
        "op": node.op,
        "target": encode_target(node.target) if node.op == "call_function" else str(node.target),
        "args": [encode(argument) for argument in node.args],
        "kwargs": {name: encode(argument) for name, argument in node.kwargs.items()},
    }
    if node.op == "placeholder":
        entry["value"] = _encode_input(node.meta.get("val"))
    if DONE in node.meta:
        entry[DONE] = list(node.meta[DONE])
    if "stack_trace" in node.meta:
        entry["stack_trace"] = node.meta["stack_trace"]
    if node.meta.get("nn_module_stack"):
        entry["module_stack"] = [[key, path, str(kind)] for key, (path, kind) in node.meta["nn_module_stack"].items()]
    return entry


def _encode_input(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return {"literal": encode(value)}
    return {
        "dtype": str(value.dtype).removeprefix("torch."),
        "device": str(value.device),
        "shape": [_encode_size(size) for size in value.shape],
    }


def _encode_size(size: Any) -> int | str:
    return str(size.node.expr) if isinstance(size, torch.SymInt) else int(size)


def encode_symbols(graph: fx.Graph) -> dict[str, dict[str, int | None]]:
    """Every symbol in an input's shape: its value in the example inputs and its range (``None``: no upper bound)."""
    table: dict[str, dict[str, int | None]] = {}
    for size in _dynamic_sizes(graph):
        env = size.node.shape_env
        for symbol in size.node.expr.free_symbols:
            bounds = env.var_to_range[symbol]
            table[str(symbol)] = {
                "hint": int(env.backed_var_to_val[symbol]),
                "low": int(bounds.lower),
                "high": None if bounds.upper is int_oo else int(bounds.upper),
            }
    return table


def _dynamic_sizes(graph: fx.Graph) -> Iterator[Any]:
    for node in graph.nodes:
        value: Any = node.meta.get("val") if node.op == "placeholder" else None
        shape: tuple[Any, ...] = tuple(value.shape) if isinstance(value, torch.Tensor) else ()
        yield from (size for size in shape if isinstance(size, torch.SymInt))


def decode_graph(nodes: list[Any], symbols: dict[str, Any], root: nn.Module, decoder: Decoder) -> fx.GraphModule:
    """The graph over the modules of ``root``, with a FakeTensor in every node's ``meta["val"]``."""
    graph = fx.Graph()
    for entry in nodes:
        decoder.nodes[entry["name"]] = _decode_node(graph, entry, decoder)
    graph.lint()
    graph_module = graph_module_of(root, graph)
    graph_module.eval()
    _infer_values(graph_module, nodes, symbols, decoder)
    return graph_module


def _decode_node(graph: fx.Graph, entry: Any, decoder: Decoder) -> fx.Node:
    op, target = entry["op"], entry["target"]
    args = tuple(decoder(argument) for argument in entry["args"])
    kwargs = {name: decoder(argument) for name, argument in entry["kwargs"].items()}
    for name in (entry["name"], *kwargs, *((target,) if op in ("placeholder", "output") else ())):
        if not name.isidentifier():  # it stands in the code that torch.fx generates
            raise ValueError(f"{name!r} is no name of a node")
    resolved = decode_target(target) if op == "call_function" else checked_path(target)
    node = graph.create_node(op, resolved, args, kwargs, name=entry["name"])
    if DONE in entry:
        node.meta[DONE] = tuple(map(str, entry[DONE]))
    if "stack_trace" in entry:
        node.meta["stack_trace"] = str(entry["stack_trace"])
    if "module_stack" in entry:
        node.meta["nn_module_stack"] = {key: (path, kind) for key, path, kind in entry["module_stack"]}
    return node


def _infer_values(graph_module: fx.GraphModule, nodes: list[Any], symbols: dict[str, Any], decoder: Decoder) -> None:
    env = ShapeEnv()
    sizes = {name: _symbol(env, name, entry) for name, entry in symbols.items()}
    mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
    inputs = [_decode_input(entry["value"], sizes, mode, decoder) for entry in nodes if entry["op"] == "placeholder"]
    with torch.no_grad(), enable_python_dispatcher():  # without it, some operators want numbers for symbolic sizes
        FakeTensorProp(graph_module, mode).propagate_dont_convert_inputs(*inputs)


_UNLIKELY = 7919


def _symbol(env: ShapeEnv, name: str, entry: Any) -> Any:
    from torch._dynamo.source import ConstantSource  # slow to import, and only loading needs it

    hint = int(entry["hint"]) * _UNLIKELY  # a small hint may equal another size, which would fix the symbol to it
    if entry["high"] is not None and hint > int(entry["high"]):
        hint = int(entry["hint"])
    symbol = env.create_symbol(hint, source=ConstantSource(name), dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
    env.constrain_symbol_range(symbol, int(entry["low"]), int_oo if entry["high"] is None else int(entry["high"]))
    return env.create_symintnode(symbol, hint=hint)


def _decode_input(data: Any, sizes: Mapping[str, Any], mode: FakeTensorMode, decoder: Decoder) -> Any:
    if "literal" in data:
        return decoder(data["literal"])
    shape = [_size(size, sizes) for size in data["shape"]]
    with mode:
        return torch.empty(shape, dtype=decoder({"dtype": data["dtype"]}), device=decoder.device(data["device"]))


_ARITHMETIC: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def _size(text: int | str, sizes: Mapping[str, Any]) -> Any:
    """A size such as ``7``, ``s0`` or ``2*s0 + 1``: sums and products of symbols, and nothing else."""
    return text if isinstance(text, int) else _evaluate(ast.parse(text, mode="eval").body, sizes)


def _evaluate(tree: ast.expr, sizes: Mapping[str, Any]) -> Any:
    match tree:
        case ast.Constant(value=int(number)):
            return number
        case ast.Name(id=name):
            return sizes[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluate(operand, sizes)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            return _ARITHMETIC[type(op)](_evaluate(left, sizes), _evaluate(right, sizes))
    raise ValueError(f"{ast.unparse(tree)!r} is no size")
