"""What each layer of a model costs: parameters, multiply-accumulates (MACs) and bytes.

Sizes come from the graph's symbolic shapes, so nothing runs and models on the meta device are fine.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from fxcompress.passes.quantization.held import integer_weight, reads_integers
from fxcompress.passes.quantization.nodes import is_quantization
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from fxcompress.formatting import BYTES, MACS, PARAMS
from fxcompress.ir.example_sizes import ExampleSizes
from fxcompress.ir.layers import BY_OVERLOAD
from fxcompress.ir.macs import RULES, ShapedCall
from fxcompress.ir.ops import Operation, operation, state_read
from fxcompress.ir.program import Program
from fxcompress.pass_base import Analysis
from fxcompress.task import Task


@dataclass(frozen=True)
class LayerCost:
    """The cost of one call of a layer, for one sample.

    Attributes:
        name: Qualified module name, or the node's name where the call is no module; ``name@1`` is a second call.
        kind: Class of the module, or name of the operator; ``W8`` behind it for a weight of 8-bit integers, ``A8`` for
            an input made of integers.
        params: Elements of the parameters that no earlier row has; 0 where all are shared with one.
        macs: Multiply-accumulates.
        weight_bytes: Bytes of parameters and buffers that no earlier row has; where a weight is quantized, of its
            integers and their scales.
        activation_bytes: Bytes of the output, of integers where nothing else is read.
        output_shape: Shape of the (first) output.
        dtype: Element type of the (first) output.
    """

    name: str
    kind: str
    params: int
    macs: int
    weight_bytes: int
    activation_bytes: int
    output_shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, repr=False)
class CostReport:
    """The cost of a model for one sample of its example inputs.

    Attributes:
        layers: One row a call that reads state or multiplies, in execution order.
    """

    layers: tuple[LayerCost, ...]

    @cached_property
    def params(self) -> int:
        """Elements of all parameters, shared ones counted once."""
        return sum(layer.params for layer in self.layers)

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulates."""
        return sum(layer.macs for layer in self.layers)

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of all parameters and buffers, shared ones counted once."""
        return sum(layer.weight_bytes for layer in self.layers)

    @cached_property
    def activation_bytes(self) -> int:
        """Bytes of the outputs of all layers."""
        return sum(layer.activation_bytes for layer in self.layers)

    def __repr__(self) -> str:
        params, macs = PARAMS.text(self.params), MACS.text(self.macs)
        return f"CostReport({params} params, {macs} MACs, {BYTES.text(self.weight_bytes)}, {len(self.layers)} layers)"


@dataclass(frozen=True)
class Cost(Analysis[CostReport]):
    """Counts parameters, MACs, weight and activation bytes of each layer.

    A dynamic batch counts as 1; every other dynamic size, and a fixed batch, as in the example inputs.
    """

    name: ClassVar[str] = "cost"

    def run(self, program: Program, task: Task | None) -> CostReport:
        sizes = ExampleSizes(program)
        counted: set[int] = set()
        calls: Counter[str] = Counter()
        layers = []
        for node in program.nodes:
            if node.op in ("placeholder", "get_attr") or is_quantization(node):
                continue
            state = {id(tensor): (tensor, size) for tensor, size in _state(program.graph_module, node)}
            call = operation(program.graph_module, node)
            products = _macs(call, sizes) if call is not None else 0
            if state or products:
                own = [held for key, held in state.items() if key not in counted]
                counted |= state.keys()
                layers.append(_row(program.graph_module, node, own, products, sizes, calls))
        return CostReport(tuple(layers))


def _macs(call: Operation, sizes: ExampleSizes) -> int:
    if call.overload not in RULES:
        return 0
    return RULES[call.overload](ShapedCall(sizes.shapes(dict(call.arguments)), sizes.shape(_outputs(call.node)[0])))


def _outputs(node: fx.Node) -> list[torch.Tensor]:
    return [value for value in tree_leaves(node.meta.get("val")) if isinstance(value, torch.Tensor)]


def _state(root: fx.GraphModule, node: fx.Node) -> Iterator[tuple[torch.Tensor, int]]:
    """The state that a node reads, each tensor with its bytes."""
    for reader in (node, *node.all_input_nodes):
        if reader is node or reader.op == "get_attr":
            for tensor in state_read(root, reader).values():
                yield tensor, tensor.numel() * tensor.element_size()
    weight = integer_weight(root, node)
    if weight is not None:
        yield from weight.tensors


def _row(
    root: fx.GraphModule,
    node: fx.Node,
    own: list[tuple[torch.Tensor, int]],
    products: int,
    sizes: ExampleSizes,
    calls: Counter[str],
) -> LayerCost:
    name, kind = _named(root, node)
    calls[name] += 1
    outputs = _outputs(node)
    shapes = [sizes.shape(value) for value in outputs]
    return LayerCost(
        name=name if calls[name] == 1 else f"{name}@{calls[name] - 1}",
        kind=kind,
        params=sum(tensor.numel() for tensor, _ in own if isinstance(tensor, nn.Parameter)),
        macs=products,
        weight_bytes=sum(size for _, size in own),
        activation_bytes=sum(
            math.prod(shape) * (1 if _read_as_integers(node) else value.element_size())
            for shape, value in zip(shapes, outputs, strict=True)
        ),
        output_shape=shapes[0] if shapes else (),
        dtype=str(outputs[0].dtype).removeprefix("torch.") if outputs else "",
    )


def _named(root: fx.GraphModule, node: fx.Node) -> tuple[str, str]:
    """Name and kind; a module that became a call with a quantized weight keeps them."""
    if node.op == "call_module":
        return str(node.target), type(root.get_submodule(str(node.target))).__name__
    weight = integer_weight(root, node)
    if weight is None:
        return node.name, str(getattr(node.target, "__name__", node.target))
    path, _, leaf = weight.name.rpartition(".")
    modules = BY_OVERLOAD.get(node.target, [])  # type: ignore[call-overload]
    kind = modules[0].module.__name__ if modules else str(getattr(node.target, "__name__", node.target))
    integers = f"W{weight.bits}A8" if reads_integers(root, node) else f"W{weight.bits}"
    return path if path and leaf == "weight" else node.name, f"{kind} {integers}"


def _read_as_integers(node: fx.Node) -> bool:
    """Whether nothing reads a value but what makes integers of it, maybe behind an activation."""
    while len(node.users) == 1:
        (user,) = node.users
        if is_quantization(user) or len(user.all_input_nodes) > 1 or not _same_shape(node, user):
            break
        node = user
    return bool(node.users) and all(map(is_quantization, node.users))


def _same_shape(node: fx.Node, user: fx.Node) -> bool:
    shapes = [getattr(each.meta.get("val"), "shape", None) for each in (node, user)]
    return shapes[0] is not None and shapes[0] == shapes[1]
