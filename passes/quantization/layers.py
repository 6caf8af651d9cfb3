"""Layers that compute with integers: where the weight, its grid and the bias of each is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from fxcompress.passes.calibrated.rounding import WeightGrid
from fxcompress.passes.quantization.nodes import quantized
from torch import fx, nn

from fxcompress.ir.ops import get_state, operation, readers, replace_state
from fxcompress.ir.weighted import WeightedLayer, add_bias, successor, weighted_layer
from fxcompress.pass_base import Refusal

_QUANTIZERS = {
    quantized.quantize_per_tensor.default,
    quantized.quantize_per_tensor.tensor,
    quantized.quantize_per_channel.default,
}
_DEQUANTIZERS = {
    quantized.dequantize_per_tensor.default,
    quantized.dequantize_per_tensor.tensor,
    quantized.dequantize_per_channel.default,
}


class Floating(fx.Interpreter):
    """Runs a graph as if nothing was quantized: what goes through Q/DQ nodes stays as it is."""

    def run_node(self, n: fx.Node) -> object:
        return self.env[n.args[0]] if is_qdq(n) else super().run_node(n)  # type: ignore[index]


def is_qdq(node: fx.Node) -> bool:
    """Whether a node quantizes or dequantizes."""
    return node.target in _QUANTIZERS or node.target in _DEQUANTIZERS


@dataclass(frozen=True, eq=False)
class QuantizedLayer:
    """A layer whose weight goes through a pair of Q/DQ nodes.

    Attributes:
        layer: The layer.
        name: Qualified name of its weight.
    """

    layer: WeightedLayer
    name: str

    def weight(self, root: fx.GraphModule) -> torch.Tensor:
        """The weight in floating point."""
        return get_state(root, self.name)

    def grid(self, root: fx.GraphModule) -> WeightGrid:
        """The grid of its weight; the scale broadcasts to it."""
        dequantize = self.layer.operation["weight"]
        _, scale, _, axis, low, high, *_ = dequantize.args
        weight = self.weight(root)
        shape = [-1 if dim == axis else 1 for dim in range(weight.dim())]
        return WeightGrid(get_state(root, str(scale.target)).reshape(shape), low, high)

    def put_weight(self, root: fx.GraphModule, weight: torch.Tensor) -> None:
        """Takes other weights, in floating point."""
        old = self.weight(root)
        replace_state(root, old, successor(old, weight))

    def shift_bias(self, root: fx.GraphModule, shift: torch.Tensor) -> None:
        """Adds to the bias, one value per output channel; makes one where there is none."""
        call = operation(root, self.layer.node)
        assert call is not None
        bias = call["bias"]
        if bias is not None:
            replace_state(root, bias, successor(bias, bias.detach().double() + shift))
            return
        like = self.weight(root)
        made = like.detach().new_empty(shift.shape)
        made = nn.Parameter(made, requires_grad=like.requires_grad) if isinstance(like, nn.Parameter) else made
        path, _, leaf = self.name.rpartition(".")
        add_bias(root, call.node, f"{path}.{leaf}_bias".lstrip("."), successor(made, shift))


def quantized_layer(root: fx.GraphModule, node: fx.Node) -> QuantizedLayer | None:
    """The layer that a node calls, if its weight goes from the model's state through one pair of Q/DQ nodes."""
    call = operation(root, node)
    layer = weighted_layer(call) if call is not None else None
    if layer is None:
        return None
    dequantize = layer.operation.operands.get("weight")
    if dequantize is None or dequantize.target is not quantized.dequantize_per_channel.default:
        return None
    weight = dequantize.all_input_nodes[0].args[0]
    if isinstance(weight, fx.Node) and weight.op == "get_attr":
        return QuantizedLayer(layer, str(weight.target))
    return None


def objections(root: fx.GraphModule) -> Iterator[Refusal]:
    """Quantized layers to which nothing can be fitted by itself."""
    shared = {tensor for tensor, calls in readers(root).items() if len(calls) > 1}
    for node in root.graph.nodes:
        found = quantized_layer(root, node)
        if found is None:
            continue
        call = found.layer.operation
        held = [found.weight(root), call.parameter("bias")]
        if any(id(tensor) in shared for tensor in held) or len(call["weight"].users) > 1:
            yield Refusal("shared-weight", node.name, "another call reads its weight or bias too; give each its own")
        elif "bias" in call.operands:
            yield Refusal(
                "computed-bias", node.name, "its bias is computed in the graph, so nothing can be added to it"
            )
