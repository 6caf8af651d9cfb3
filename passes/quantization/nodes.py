"""Q/DQ nodes: the ecosystem's ``quantized_decomposed`` operators in a graph.

``quantize`` makes integers of a value and ``dequantize`` real values of them; in between stands what an engine keeps.
Weights stay parameters in floating point with a pair of nodes behind them, so that a later pass can move them to the
grid point of its choice; exported files hold the integers.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers the operators
from fxcompress.passes.quantization.grid import SMALLEST, QuantizationParameters
from torch import fx

from fxcompress.errors import InputError, did_you_mean
from fxcompress.tracing.raising import called_path

QUANTIZED = "quantized_decomposed"
"""Namespace of the operators."""

quantized = torch.ops.quantized_decomposed


def quantize_dequantize(source: fx.Node, parameters: QuantizationParameters) -> fx.Node:
    """A pair of nodes right behind a value, one scale for all of it; gives the node of the real values."""
    p = parameters
    given = (p.scale, p.zero_point, p.quant_min, p.quant_max, p.dtype)
    with source.graph.inserting_after(last_input(source)):
        integers = call(quantized.quantize_per_tensor.default, (source, *given))
    with source.graph.inserting_after(integers):
        return call(quantized.dequantize_per_tensor.default, (integers, *given))


def quantize_at_run_time(source: fx.Node) -> fx.Node:
    """As :func:`quantize_dequantize`, with the 8-bit grid that holds the values of each call."""
    graph, grid = source.graph, (0, 255)
    with graph.inserting_after(last_input(source)):
        chosen = call(quantized.choose_qparams.tensor, (source, *grid, SMALLEST, torch.uint8))
    with graph.inserting_after(chosen):
        zero_point = graph.call_function(operator.getitem, (chosen, 1))
        scale = graph.call_function(operator.getitem, (chosen, 0))
    for index, part in enumerate((scale, zero_point)):
        part.meta["val"] = chosen.meta["val"][index]
    given = (scale, zero_point, *grid, torch.uint8)
    with graph.inserting_after(zero_point):
        integers = call(quantized.quantize_per_tensor.tensor, (source, *given))
    with graph.inserting_after(integers):
        return call(quantized.dequantize_per_tensor.tensor, (integers, *given))


def is_quantization(node: fx.Node) -> bool:
    """Whether a node quantizes, dequantizes or finds a grid."""
    return getattr(node.target, "namespace", None) == QUANTIZED


def last_input(node: fx.Node) -> fx.Node:
    """Inputs stay together at the head of the graph."""
    while node.op == "placeholder" and node.next.op == "placeholder":
        node = node.next
    return node


def call(target: Any, args: Sequence[Any]) -> fx.Node:
    """A node at the place where its first operand's graph inserts, with the fake tensor that it stands for."""
    made: fx.Node = args[0].graph.call_function(target, tuple(args))
    values = fx.node.map_arg(tuple(args), lambda node: node.meta["val"])
    with args[0].meta["val"].fake_mode:
        made.meta["val"] = target(*values)
    return made


def skipped(nodes: Iterable[fx.Node], patterns: Sequence[str]) -> set[fx.Node]:
    """The nodes that a pattern names: by their own name, by the module that they call or come from, or one around it.

    Raises:
        InputError: A pattern names none; near names are given.
    """
    found: set[fx.Node] = set()
    names = {node: _names(node) for node in nodes} if patterns else {}
    for pattern in patterns:
        named = {node for node, own in names.items() if any(fnmatchcase(name, pattern) for name in own)}
        if not named:
            known = set().union(*names.values())
            raise InputError(f"the pattern {pattern!r} in skip matches no layer{did_you_mean(pattern, known)}")
        found |= named
    return found


def _names(node: fx.Node) -> set[str]:
    path = str(node.target) if node.op == "call_module" else called_path(node)
    parts = path.split(".")
    return {node.name, *(".".join(parts[:count]) for count in range(1, len(parts) + 1) if path)}
