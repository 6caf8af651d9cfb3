"""Layers with a weight: convolution, transposed convolution and linear, behind one view of how the weight is laid out.

Each is, per group, a matrix of filters from input to output channels. ``split`` shows a weight as
``(groups, outputs per group, inputs per group, *kernel)``, ``join`` puts it back.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch._ops import OpOverload

from fxcompress.ir.ops import Operation, free_name, operation, replace_state, set_state

aten = torch.ops.aten


@dataclass(frozen=True)
class WeightLayout:
    """Where channels are in a layer's weight and in the tensors it reads and writes.

    Attributes:
        spatial: Number of spatial dims; 0 for linear.
        groups: Number of groups of channels that do not mix.
        transposed: Whether the weight is ``(inputs, outputs per group, *kernel)``.
    """

    spatial: int
    groups: int = 1
    transposed: bool = False

    def split(self, weight: torch.Tensor) -> torch.Tensor:
        """A view of shape ``(groups, outputs per group, inputs per group, *kernel)``."""
        parts = weight.reshape(self.groups, -1, *weight.shape[1:])
        return parts.transpose(1, 2) if self.transposed else parts

    def join(self, parts: torch.Tensor) -> torch.Tensor:
        """The weight that ``split`` shows as ``parts``."""
        return (parts.transpose(1, 2) if self.transposed else parts).flatten(0, 1)

    def per_output(self, vector: torch.Tensor) -> torch.Tensor:
        """A vector over output channels, shaped to broadcast against ``split``."""
        return vector.reshape(self.groups, -1, 1, *(1,) * self.spatial)

    def per_input(self, vector: torch.Tensor) -> torch.Tensor:
        """A vector over input channels, shaped to broadcast against ``split``."""
        return vector.reshape(self.groups, 1, -1, *(1,) * self.spatial)

    def channel_dim(self, rank: int) -> int:
        """The channel dim of an input or output of ``rank`` dims; a convolution's may come without a batch dim."""
        return rank - 1 - self.spatial


_SPATIAL: dict[OpOverload, int] = {
    aten.linear.default: 0,
    aten.conv1d.default: 1,
    aten.conv1d.padding: 1,
    aten.conv2d.default: 2,
    aten.conv2d.padding: 2,
    aten.conv3d.default: 3,
    aten.conv3d.padding: 3,
}
_SPATIAL_TRANSPOSED: dict[OpOverload, int] = {
    aten.conv_transpose1d.default: 1,
    aten.conv_transpose2d.input: 2,
    aten.conv_transpose3d.input: 3,
}


@dataclass(frozen=True)
class WeightedLayer:
    """A call of a layer whose output is linear in its input, up to a bias.

    Attributes:
        operation: The call.
        layout: How its weight is laid out.
    """

    operation: Operation
    layout: WeightLayout

    @property
    def node(self) -> fx.Node:
        return self.operation.node

    @property
    def kernel(self) -> tuple[int, ...]:
        """Spatial sizes of its filters; the weight may be state or computed."""
        weight = self.operation["weight"]
        return tuple((weight.meta["val"] if isinstance(weight, fx.Node) else weight).shape[2:])

    @property
    def sees_every_tap(self) -> bool:
        """Whether each output sums all taps of its filter on real input: no zero padding, none left out at the border.

        A transposed convolution with stride 1 is a convolution with padding ``dilation * (kernel - 1) - padding``.
        """
        if self.layout.spatial == 0:
            return True
        call = self.operation
        reach = [d * (k - 1) for d, k in zip(call["dilation"], self.kernel, strict=True)]
        if call["padding"] == "same":
            return not any(reach)
        if not self.layout.transposed:
            return call["padding"] == "valid" or not any(call["padding"])
        spare = zip(call["stride"], call["padding"], reach, call["output_padding"], strict=True)
        return all(stride == 1 and padding >= taps + extra for stride, padding, taps, extra in spare)

    def scaled_outputs(self, scale: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of ``scale * layer(x) + shift``, with one scale and shift per output channel."""
        parts = self.layout.split(_double(self.operation["weight"]))
        return self._successors(parts * self.layout.per_output(scale), self._bias() * scale + shift)

    def scaled_inputs(self, scale: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of ``layer(scale * x + shift)``, with one scale and shift per input channel.

        Exact if ``shift`` is 0 or the layer :attr:`sees_every_tap`.
        """
        parts = self.layout.split(_double(self.operation["weight"]))
        seen = (parts * self.layout.per_input(shift)).flatten(2).sum(2).flatten()
        return self._successors(parts * self.layout.per_input(scale), self._bias() + seen)

    def _bias(self) -> torch.Tensor | float:
        return 0.0 if self.operation["bias"] is None else _double(self.operation["bias"])

    def _successors(self, parts: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weight, old_bias = self.operation["weight"], self.operation["bias"]
        like = weight.detach().new_empty(bias.shape) if old_bias is None else old_bias
        if old_bias is None and isinstance(weight, nn.Parameter):
            like = nn.Parameter(like, requires_grad=weight.requires_grad)
        return successor(weight, self.layout.join(parts)), successor(like, bias)


def _double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().double()


def successor(old: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A new tensor that holds ``value`` and is otherwise like ``old``: dtype, memory format, parameter, trainable."""
    made = torch.empty_like(old, requires_grad=False).copy_(value)
    return nn.Parameter(made, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else made


def weighted_layer(call: Operation) -> WeightedLayer | None:
    """The layer of a call; ``None`` if it is no convolution, transposed convolution or linear layer."""
    groups = call.arguments.get("groups", 1)
    if isinstance(call.arguments.get("weight"), torch.Tensor) and call["weight"].dim() < 2:
        return None  # linear with a vector has no output channels
    if call.overload in _SPATIAL:
        return WeightedLayer(call, WeightLayout(_SPATIAL[call.overload], groups))
    if call.overload in _SPATIAL_TRANSPOSED:
        layout = WeightLayout(_SPATIAL_TRANSPOSED[call.overload], groups, transposed=True)
        return WeightedLayer(call, layout)
    return None


def weighted_layers(graph_module: fx.GraphModule, nodes: Iterable[fx.Node]) -> tuple[WeightedLayer, ...]:
    """Those of the nodes that call such a layer."""
    calls = (operation(graph_module, node) for node in nodes)
    layers = (weighted_layer(call) for call in calls if call is not None)
    return tuple(layer for layer in layers if layer is not None)


def put_weight(graph_module: fx.GraphModule, layer: WeightedLayer, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Gives a layer a new weight and bias, under every name that the old ones have; adds a bias where there was none.

    Args:
        graph_module: The graph the layer is called in.
        layer: A layer whose weight, and bias if it has one, are state.
        weight: The new weight.
        bias: The new bias, one value per output channel.
    """
    call = layer.operation
    replace_state(graph_module, call["weight"], weight)
    if call["bias"] is not None:
        replace_state(graph_module, call["bias"], bias)
    elif call.module is not None:
        set_state(graph_module, f"{call.node.target}.bias", bias)
    else:
        path, _, leaf = call.state["weight"].rpartition(".")
        leaf = leaf.replace("weight", "bias") if "weight" in leaf else f"{leaf}_bias"
        add_bias(graph_module, call.node, f"{path}.{leaf}".lstrip("."), bias)


def add_bias(graph_module: fx.GraphModule, node: fx.Node, name: str, bias: torch.Tensor) -> None:
    """Gives an ATen call of a layer a bias where there was none, under that name or one like it that is free."""
    path, _, leaf = name.rpartition(".")
    name = f"{path}.{free_name(graph_module, path, leaf)}".lstrip(".")
    set_state(graph_module, name, bias)
    with graph_module.graph.inserting_before(node):
        read = graph_module.graph.get_attr(name)
    read.meta["val"] = node.meta["val"].new_empty(bias.shape, dtype=bias.dtype)
    if len(node.args) > 2:
        node.update_arg(2, read)
    else:
        node.update_kwarg("bias", read)
