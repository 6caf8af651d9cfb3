"""Weights as integers: one scale for each output channel (Krishnamoorthi 2018, arXiv:1806.08342), zero point 0.

A channel's scale is its largest magnitude over the largest integer, but never so small that it means nothing:

- not below ``2**-23`` of the largest scale of the weight, which is what float32 tells apart;
- not so small that the channel's bias exceeds ``2**30`` steps of ``input scale * weight scale``: engines add it to
  32-bit accumulators. What a coarser scale loses there is at most ``2**-23`` of the bias;
- 1 where that leaves nothing that float32 can hold: the whole weight is zero, and so is the bias.

Nor is it, where an engine rounds biases to steps of ``input scale * weight scale``, so large that such a step is more
than two of the result's: weights of a batch norm's channel without variance are huge, and the bias would be lost for
inputs that are always 0. A weight that is cut off so takes any other input by the whole grid of the result anyway.

Nor may two neighbours be too large together (``pairs``): x86 processors without VNNI add the products of two
neighbouring inputs in 16 bits, which saturate at 32767. Inputs are at most 255, so the integers of neighbours with one
sign add up to at most 128; which inputs stand together is the order of channels-last weights in onnxruntime and in
OpenVINO. This costs up to 3 dB in the rounding of weights where a whole bit ("reduced range") costs 6, and saturated
sums cost far more.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from fxcompress.passes.quantization.grid import SMALLEST
from fxcompress.passes.quantization.nodes import call, is_quantization, quantized
from torch import fx

from fxcompress.ir import macs
from fxcompress.ir.lowering import read_state
from fxcompress.ir.ops import Operation, argument_names, free_name, set_state
from fxcompress.ir.weighted import WeightedLayer, weighted_layer
from fxcompress.pass_base import Refusal

STORED_MATRIX = "it multiplies by a matrix of the model's state; canonicalize-linear writes it as a linear layer"
"""Why such a product is refused."""

_FACTORS = ("mat2", "other")
"""What the second factor of a product is called."""

_BIAS_STEPS = 2.0**30
_BIAS_RESULT_STEPS = 2.0
_RELATIVE = 2.0**-23
_PAIR = 2.0**15 / 2**8 - 1
"""Largest sum of two neighbours before they are rounded, each by at most a half."""


def channel_scales(
    layer: WeightedLayer, input_scale: float, bits: int = 8, pairs: bool = True, result_scale: float | None = None
) -> torch.Tensor:
    """The scales of a layer's weight, one a channel along :func:`channel_axis`, float32.

    Args:
        layer: The layer.
        input_scale: The scale of the integers that it reads.
        bits: Bits of the weight's integers.
        pairs: Whether sums of two products may have no more than 16 bits.
        result_scale: The scale of the integers that are made of the result, if biases are rounded.
    """
    largest = 2 ** (bits - 1) - 1
    weight, axis = layer.operation["weight"].detach().double(), channel_axis(layer)
    rows = weight.transpose(0, axis).flatten(1)
    scales = rows.abs().amax(1) / largest
    if pairs:
        scales = scales.maximum(_pair_sums(layer, weight) / _PAIR)
    bias = layer.operation.parameter("bias")
    if bias is not None and input_scale > 0 and result_scale is not None:
        scales = scales.clamp(max=_BIAS_RESULT_STEPS * result_scale / input_scale)
    if bias is not None and input_scale > 0:
        steps = bias.detach().double().abs().reshape(-1, len(scales)).amax(0)
        scales = scales.maximum(steps / (input_scale * _BIAS_STEPS))
    usable = scales.clamp(min=float(scales.max()) * _RELATIVE).float()
    return torch.where(usable < SMALLEST, 1.0, usable)


def _pair_sums(layer: WeightedLayer, weight: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of the sum of two weights whose products are added first, one for each scale."""
    parts = layer.layout.split(weight).movedim(2, -1)  # (groups, outputs, *kernel, inputs)
    groups, outputs, inputs = parts.shape[0], parts.shape[1], parts.shape[-1]
    rows = parts.transpose(0, 1).flatten(1) if layer.layout.transposed else parts.flatten(0, 1).flatten(1)
    depthwise = groups > 1 and inputs == outputs == 1  # its kernels add one product at a time
    if depthwise or rows.shape[1] == 1:
        return rows.new_zeros(len(rows))
    return rows.unfold(1, 2, 1 if inputs % 2 else 2).sum(-1).abs().amax(1)


def objection(call: Operation) -> tuple[str, str] | None:
    """Code and reason of a refusal, if the weight of a layer cannot become integers."""
    weight, bias = call.parameter("weight"), call.parameter("bias")
    if weight is None:
        return "computed-weight", "its weight is computed in the graph; store the weight"
    if weight.numel() == 0:
        return "empty-weight", "its weight holds no numbers; take the layer out of the model"
    if weight.dtype != torch.float32:
        dtype = f"its weight is {weight.dtype}, and only torch.float32 becomes integers; convert the model first"
        return "not-float32", dtype
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
            return "not-finite", f"its {name} holds NaN or Inf; repair the model"
    return None


def is_quantized(call: Operation) -> bool:
    """Whether the weight of a layer goes through Q/DQ nodes already."""
    weight = call.operands.get("weight")
    return weight is not None and is_quantization(weight)


def multiplies_stored_matrix(call: Operation) -> bool:
    """Whether an operation is a product with a matrix of the model's state, as ``canonicalize-linear`` looks for."""
    return any(name in call.state and call[name].dim() == 2 for name in _FACTORS)


def other_products(call: Operation) -> Iterator[Refusal]:
    """A refusal, if an operation is no layer and yet multiplies by stored weights."""
    if call.overload not in macs.RULES or weighted_layer(call) is not None:
        return
    if multiplies_stored_matrix(call):
        yield Refusal("constant-operand", call.node.name, STORED_MATRIX)
    elif any(node.op == "get_attr" and node.meta["val"].dim() > 1 for node in call.node.all_input_nodes):
        reason = f"only the weights of layers become integers, and {call.overload} is none; they stay as they are"
        yield Refusal("no-integer-kernel", call.node.name, reason)


def channel_axis(layer: WeightedLayer) -> int:
    """The dim of a weight that output channels lie along; in a transposed convolution those of each group."""
    return 1 if layer.layout.transposed else 0


def quantize_weight(
    graph_module: fx.GraphModule, layer: WeightedLayer, reader: fx.Node, scales: torch.Tensor, bits: int = 8
) -> None:
    """Puts Q/DQ nodes between a layer's weight and ``reader``, the ``call_function`` of the layer."""
    largest = 2 ** (bits - 1) - 1
    position = argument_names(layer.operation.overload).index("weight")
    weight = reader.args[position]
    path, _, leaf = layer.operation.state["weight"].rpartition(".")
    held = {"scale": scales, "zero_point": torch.zeros(len(scales), dtype=torch.int64, device=scales.device)}
    states = []
    for suffix, tensor in held.items():
        name = f"{path}.{free_name(graph_module, path, f'{leaf}_{suffix}')}".lstrip(".")
        set_state(graph_module, name, tensor)
        states.append(read_state(graph_module, name, reader))
    given = (*states, channel_axis(layer), -largest, largest, torch.int8)
    with graph_module.graph.inserting_before(reader):
        integers = call(quantized.quantize_per_channel.default, (weight, *given))
        reader.update_arg(position, call(quantized.dequantize_per_channel.default, (integers, *given)))
