"""Computes a model in 16 bits where that is safe, after the operator lists of mixed-precision training.

Products lose little in 16 bits, sums of many values, exponentials and normalizations do (Micikevicius et al. 2018,
arXiv:1710.03740). What is in neither list stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from fxcompress.passes.quantization.nodes import QUANTIZED, call, last_input, skipped
from fxcompress.passes.quantization.targets import CLAMPS, LAYERS, PRODUCTS, TRANSPOSED, VIEWS
from torch import fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from fxcompress.errors import InputError
from fxcompress.ir.lowering import lowered
from fxcompress.ir.ops import operation, operations, overload_of, readers, replace_states, state_read
from fxcompress.ir.program import Program
from fxcompress.pass_base import Guarantee, PassResult, Refusal, Transform
from fxcompress.task import Task

aten = torch.ops.aten

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}

_PRODUCTS = frozenset({*LAYERS, *PRODUCTS, *TRANSPOSED, aten.scaled_dot_product_attention.default})
"""What is computed in 16 bits wherever it stands."""

_FOLLOWING = VIEWS | CLAMPS | frozenset(
    {
        aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.neg.default, aten.cat.default, aten.stack.default,
        aten.gelu.default, aten.silu.default, aten.sigmoid.default, aten.tanh.default, aten.hardswish.default,
        aten.hardsigmoid.default, aten.leaky_relu.default, aten.prelu.default, aten.pad.default,
        aten.constant_pad_nd.default, aten.adaptive_avg_pool2d.default, aten.avg_pool2d.default,
        aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int,
    }
)  # fmt: skip
"""What is computed in 16 bits where all that it reads is."""


@dataclass(frozen=True)
class Cast(Transform):
    """Computes convolutions, linear layers, products, and what stands between them, in 16 bits.

    Inputs and outputs keep their dtype; normalizations, softmax, reductions and whatever else is not known to be safe
    stay in 32 bits. Quantized layers are left alone. Refuses ``overflow``, naming the layer, where a weight is larger
    than the dtype holds, and ``not-float32``.

    Attributes:
        dtype: ``float16`` or ``bfloat16``.
        skip: Patterns of layers that must stay in 32 bits: qualified names of modules, or of nodes.
    """

    name: ClassVar[str] = "cast"
    guarantee: ClassVar[Guarantee] = "lossy"

    dtype: str = "float16"
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")

    def run(self, program: Program, task: Task | None) -> PassResult:
        """Counts the ``layers`` and products in 16 bits, and the ``casts`` between them and the rest."""
        root, dtype = program.graph_module, DTYPES[self.dtype]
        refusals = tuple(_objections(root, dtype))
        kept = {refusal.node for refusal in refusals}
        skip = skipped(program.nodes, self.skip)
        chosen = _chosen(root, lambda node: node.name in kept or node in skip)
        layers = sum(overload_of(root, node) in _PRODUCTS for node in chosen)
        chosen = _with_own_state(root, chosen)
        chosen |= _narrow_state(root, chosen, dtype)
        for node in chosen:
            node.meta["val"] = tree_map(lambda value: _fake(value, dtype), node.meta["val"])
        casts = _insert_casts(list(program.nodes), chosen, dtype)
        return PassResult(bool(chosen), refusals, {"layers": layers, "casts": casts})


def _objections(root: fx.GraphModule, dtype: torch.dtype) -> Iterator[Refusal]:
    for found in operations(root, _PRODUCTS):
        for name in found.state:
            tensor = found[name]
            if tensor.dtype not in (torch.float32, *DTYPES.values()):
                yield Refusal("not-float32", found.node.name, f"its {name} is {tensor.dtype}; convert the model first")
            elif tensor.numel() and not float(tensor.detach().abs().max()) <= torch.finfo(dtype).max:
                yield Refusal("overflow", found.node.name, f"its {name} is larger than {dtype} holds; use bfloat16")
            else:
                continue
            break


def _chosen(root: fx.GraphModule, kept: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """The nodes to compute in 16 bits."""
    chosen: set[fx.Node] = set()
    for node in root.graph.nodes:
        found = operation(root, node)
        reads = [operand for operand in node.all_input_nodes if operand.op != "get_attr" and _is_float(operand)]
        if found is None:
            if node.op == "call_function" and chosen.issuperset(node.all_input_nodes) and _is_float(node):
                chosen.add(node)  # one of several results
        elif kept(node) or not _is_float(node) or any(_is_quantized(operand) for operand in node.all_input_nodes):
            continue
        elif found.overload in _PRODUCTS or (found.overload in _FOLLOWING and reads and chosen.issuperset(reads)):
            chosen.add(node)
    return chosen


def _with_own_state(root: fx.GraphModule, chosen: set[fx.Node]) -> set[fx.Node]:
    """The same nodes, where modules that share state with nodes in 32 bits read it in the graph."""
    held = readers(root)
    found = set()
    for node in chosen:
        tensors = state_read(root, node).values() if node.op == "call_module" else ()
        shared = any(not chosen.issuperset(held[id(tensor)]) for tensor in tensors)
        found_call = operation(root, node)
        found.add(lowered(root, found_call) if shared and found_call is not None else node)
    return found


def _narrow_state(root: fx.GraphModule, chosen: set[fx.Node], dtype: torch.dtype) -> set[fx.Node]:
    """Stores in 16 bits what only nodes in 16 bits read; gives the nodes that read it for them."""
    held = readers(root)
    narrow: dict[int, torch.Tensor] = {}
    reads: set[fx.Node] = set()
    for node in root.graph.nodes:
        for tensor in state_read(root, node).values():
            if tensor.dtype == torch.float32 and held[id(tensor)] and chosen.issuperset(held[id(tensor)]):
                value = tensor.detach().to(dtype)
                own = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
                narrow.setdefault(id(tensor), own)
                if node.op == "get_attr":
                    reads.add(node)
    replace_states(root, narrow)
    return reads


def _insert_casts(nodes: list[fx.Node], chosen: set[fx.Node], dtype: torch.dtype) -> int:
    """Casts each value once for those readers that compute in the other precision; counts the casts."""
    casts = 0
    for node in nodes:
        others = [user for user in node.users if (user in chosen) != (node in chosen)]
        value = node.meta.get("val")
        if not others or not isinstance(value, torch.Tensor) or not value.is_floating_point():
            continue
        with node.graph.inserting_after(last_input(node)):
            made = call(aten.to.dtype, (node, torch.float32 if node in chosen else dtype))
        for user in others:
            user.replace_input_with(node, made)
        casts += 1
    return casts


def _fake(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.dtype == torch.float32 else value


def _is_float(node: fx.Node) -> bool:
    leaves = tree_leaves(node.meta.get("val"))
    return any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float32 for leaf in leaves)


def _is_quantized(node: fx.Node) -> bool:
    return getattr(node.target, "namespace", None) == QUANTIZED
