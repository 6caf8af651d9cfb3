"""Standard layers: one table that pairs an ATen overload with the ``torch.nn`` module it is raised to.

Both directions are read off the same row: tracing raises an ATen call to the module (``build``), and the operation
adapter (:mod:`fxcompress.ir.ops`) lowers the module back to the ATen call's named arguments (``arguments``). Adding a
layer is adding a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload

aten = torch.ops.aten

Attributes = Mapping[str, Any]


@dataclass(frozen=True)
class Layer:
    """How one standard layer is written as an ATen call and as a module.

    Attributes:
        module: The ``torch.nn`` class.
        overload: The ATen overload that its forward calls.
        state: ATen argument name -> name of the parameter or buffer in the module.
        build: Makes the module, on the meta device, from the call's arguments (tensors appear as tensors).
        arguments: Reads the call's non-tensor arguments back from a module.
        extra_state: State of the module that the call does not mention.
        accepts: Whether this row fits the call (rows of one overload differ by rank, for example).
    """

    module: type[nn.Module]
    overload: OpOverload
    state: Mapping[str, str]
    build: Callable[[Attributes], nn.Module]
    arguments: Callable[[Any], dict[str, Any]]
    extra_state: tuple[str, ...] = ()
    accepts: Callable[[Attributes], bool] = lambda call: True


WEIGHT_BIAS = {"weight": "weight", "bias": "bias"}
_NORM_STATE = {**WEIGHT_BIAS, "running_mean": "running_mean", "running_var": "running_var"}


def _tuple(value: Any, rank: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return values * rank if len(values) == 1 else values


def _padding(value: Any, rank: int) -> Any:
    return value if isinstance(value, str) else _tuple(value, rank)


def _conv(module: type[nn.Module], overload: OpOverload, rank: int) -> Layer:
    def build(call: Attributes) -> nn.Module:
        weight = call["weight"]
        return module(
            weight.shape[1] * call["groups"],
            weight.shape[0],
            tuple(weight.shape[2:]),
            stride=_tuple(call["stride"], rank),
            padding=_padding(call["padding"], rank),
            dilation=_tuple(call["dilation"], rank),
            groups=call["groups"],
            bias=call["bias"] is not None,
            device="meta",
        )

    def arguments(conv: nn.Conv2d) -> dict[str, Any]:
        return {
            "stride": list(conv.stride),
            "padding": conv.padding if isinstance(conv.padding, str) else list(conv.padding),
            "dilation": list(conv.dilation),
            "groups": conv.groups,
        }

    return Layer(module, overload, WEIGHT_BIAS, build, arguments)


def _conv_transpose(module: type[nn.Module], overload: OpOverload, rank: int) -> Layer:
    def build(call: Attributes) -> nn.Module:
        weight = call["weight"]
        return module(
            weight.shape[0],
            weight.shape[1] * call["groups"],
            tuple(weight.shape[2:]),
            stride=_tuple(call["stride"], rank),
            padding=_tuple(call["padding"], rank),
            output_padding=_tuple(call["output_padding"], rank),
            groups=call["groups"],
            bias=call["bias"] is not None,
            dilation=_tuple(call["dilation"], rank),
            device="meta",
        )

    def arguments(conv: nn.ConvTranspose2d) -> dict[str, Any]:
        return {
            "stride": list(conv.stride),
            "padding": list(conv.padding),
            "output_padding": list(conv.output_padding),
            "groups": conv.groups,
            "dilation": list(conv.dilation),
        }

    return Layer(module, overload, WEIGHT_BIAS, build, arguments)


def _linear() -> Layer:
    def build(call: Attributes) -> nn.Module:
        out_features, in_features = call["weight"].shape
        return nn.Linear(in_features, out_features, bias=call["bias"] is not None, device="meta")

    return Layer(
        nn.Linear,
        aten.linear.default,
        WEIGHT_BIAS,
        build,
        lambda linear: {},
        accepts=lambda call: call["weight"].dim() == 2,
    )


def _with_statistics(module: type[nn.Module]) -> Callable[[Attributes], nn.Module]:
    """Builds a norm that may keep running statistics."""

    def build(call: Attributes) -> nn.Module:
        return module(
            call["input"].shape[1],
            eps=call["eps"],
            momentum=call["momentum"],
            affine=call["weight"] is not None,
            track_running_stats=call["running_mean"] is not None,
            device="meta",
        )

    return build


def _batch_norm(module: type[nn.Module], ranks: tuple[int, ...]) -> Layer:
    def arguments(norm: nn.BatchNorm2d) -> dict[str, Any]:
        return {
            "training": norm.training or norm.running_mean is None,
            "momentum": norm.momentum if norm.momentum is not None else 0.0,
            "eps": norm.eps,
            "cudnn_enabled": True,
        }

    def accepts(call: Attributes) -> bool:
        affine = (call["weight"] is None) == (call["bias"] is None)
        return affine and call["input"].dim() in ranks and call["training"] == (call["running_mean"] is None)

    return Layer(
        module,
        aten.batch_norm.default,
        _NORM_STATE,
        _with_statistics(module),
        arguments,
        extra_state=("num_batches_tracked",),
        accepts=accepts,
    )


def _instance_norm(module: type[nn.Module], rank: int) -> Layer:
    def arguments(norm: nn.InstanceNorm2d) -> dict[str, Any]:
        return {
            "use_input_stats": norm.training or norm.running_mean is None,
            "momentum": norm.momentum,
            "eps": norm.eps,
            "cudnn_enabled": True,
        }

    def accepts(call: Attributes) -> bool:
        return bool(call["input"].dim() == rank and call["use_input_stats"] == (call["running_mean"] is None))

    return Layer(
        module,
        aten.instance_norm.default,
        _NORM_STATE,
        _with_statistics(module),
        arguments,
        extra_state=("num_batches_tracked",),
        accepts=accepts,
    )


def _layer_norm() -> Layer:
    def build(call: Attributes) -> nn.Module:
        affine = call["weight"] is not None
        return nn.LayerNorm(
            call["normalized_shape"],
            eps=call["eps"],
            elementwise_affine=affine,
            bias=call["bias"] is not None,
            device="meta",
        )

    return Layer(
        nn.LayerNorm,
        aten.layer_norm.default,
        WEIGHT_BIAS,
        build,
        lambda norm: {"normalized_shape": list(norm.normalized_shape), "eps": norm.eps, "cudnn_enable": True},
        accepts=lambda call: call["weight"] is not None or call["bias"] is None,
    )


def _rms_norm() -> Layer:
    def build(call: Attributes) -> nn.Module:
        return nn.RMSNorm(
            call["normalized_shape"], eps=call["eps"], elementwise_affine=call["weight"] is not None, device="meta"
        )

    return Layer(
        nn.RMSNorm,
        aten.rms_norm.default,
        {"weight": "weight"},
        build,
        lambda norm: {"normalized_shape": list(norm.normalized_shape), "eps": norm.eps},
    )


def _group_norm() -> Layer:
    def build(call: Attributes) -> nn.Module:
        return nn.GroupNorm(
            call["num_groups"],
            call["input"].shape[1],
            eps=call["eps"],
            affine=call["weight"] is not None,
            device="meta",
        )

    return Layer(
        nn.GroupNorm,
        aten.group_norm.default,
        WEIGHT_BIAS,
        build,
        lambda norm: {"num_groups": norm.num_groups, "eps": norm.eps, "cudnn_enabled": True},
        accepts=lambda call: (call["weight"] is None) == (call["bias"] is None),
    )


def _embedding() -> Layer:
    def build(call: Attributes) -> nn.Module:
        rows, columns = call["weight"].shape
        padding = call["padding_idx"]
        return nn.Embedding(
            rows,
            columns,
            padding_idx=None if padding == -1 else padding,
            scale_grad_by_freq=call["scale_grad_by_freq"],
            sparse=call["sparse"],
            device="meta",
        )

    def arguments(embedding: nn.Embedding) -> dict[str, Any]:
        padding = embedding.padding_idx
        return {
            "padding_idx": -1 if padding is None else padding,
            "scale_grad_by_freq": embedding.scale_grad_by_freq,
            "sparse": embedding.sparse,
        }

    return Layer(
        nn.Embedding,
        aten.embedding.default,
        {"weight": "weight"},
        build,
        arguments,
        accepts=lambda call: call["weight"].dim() == 2,
    )


def _prelu() -> Layer:
    return Layer(
        nn.PReLU,
        aten.prelu.default,
        {"weight": "weight"},
        lambda call: nn.PReLU(call["weight"].numel(), device="meta"),
        lambda prelu: {},
        accepts=lambda call: call["weight"].dim() == 1,
    )


def _dropout(module: type[nn.Module], overload: OpOverload, ranks: tuple[int, ...] | None = None) -> Layer:
    return Layer(
        module,
        overload,
        {},
        lambda call: module(p=call["p"]),
        lambda dropout: {"p": dropout.p, "train": dropout.training},
        accepts=lambda call: not call["train"] and (ranks is None or call["input"].dim() in ranks),
    )


LAYERS: tuple[Layer, ...] = (
    _conv(nn.Conv1d, aten.conv1d.default, 1),
    _conv(nn.Conv2d, aten.conv2d.default, 2),
    _conv(nn.Conv3d, aten.conv3d.default, 3),
    _conv(nn.Conv1d, aten.conv1d.padding, 1),
    _conv(nn.Conv2d, aten.conv2d.padding, 2),
    _conv(nn.Conv3d, aten.conv3d.padding, 3),
    _conv_transpose(nn.ConvTranspose1d, aten.conv_transpose1d.default, 1),
    _conv_transpose(nn.ConvTranspose2d, aten.conv_transpose2d.input, 2),
    _conv_transpose(nn.ConvTranspose3d, aten.conv_transpose3d.input, 3),
    _linear(),
    _batch_norm(nn.BatchNorm1d, (2, 3)),
    _batch_norm(nn.BatchNorm2d, (4,)),
    _batch_norm(nn.BatchNorm3d, (5,)),
    _instance_norm(nn.InstanceNorm1d, 3),
    _instance_norm(nn.InstanceNorm2d, 4),
    _instance_norm(nn.InstanceNorm3d, 5),
    _layer_norm(),
    _rms_norm(),
    _group_norm(),
    _embedding(),
    _prelu(),
    _dropout(nn.Dropout, aten.dropout.default),
    _dropout(nn.Dropout1d, aten.feature_dropout.default, (2, 3)),
    _dropout(nn.Dropout2d, aten.feature_dropout.default, (4,)),
    _dropout(nn.Dropout3d, aten.feature_dropout.default, (5,)),
    _dropout(nn.AlphaDropout, aten.alpha_dropout.default),
    _dropout(nn.FeatureAlphaDropout, aten.feature_alpha_dropout.default),
)

BY_OVERLOAD: dict[OpOverload, list[Layer]] = {}
BY_MODULE: dict[type[nn.Module], list[Layer]] = {}
for _layer in LAYERS:
    BY_OVERLOAD.setdefault(_layer.overload, []).append(_layer)
    BY_MODULE.setdefault(_layer.module, []).append(_layer)


def layer_of(module: nn.Module) -> Layer | None:
    """The row of a standard module, by exact type; ``None`` for any other module."""
    rows = BY_MODULE.get(type(module), [])
    if len(rows) > 1:  # string padding has an overload of its own
        string = isinstance(getattr(module, "padding", None), str)
        rows = [layer for layer in rows if (layer.overload._overloadname == "padding") == string]
    return rows[0] if rows else None


def described(module: nn.Module) -> dict[str, object]:
    """Attributes that follow from the shapes of the state."""
    weight = getattr(module, "weight", None)
    if weight is None:
        return {}
    known, shape = vars(module), tuple(weight.shape)
    described: dict[str, object] = {}
    if "transposed" in known:
        transposed, groups = known["transposed"], known["groups"]
        described["out_channels"] = shape[1] * groups if transposed else shape[0]
        described["in_channels"] = shape[0] if transposed else shape[1] * groups
        described["kernel_size"] = shape[2:]
    for attribute, value in (
        ("num_features", shape[0]),
        ("num_channels", shape[0]),
        ("normalized_shape", shape),
        ("num_embeddings", shape[0]),
        ("embedding_dim", shape[-1]),
        ("num_parameters", shape[0]),
        ("out_features", shape[0]),
        ("in_features", shape[-1]),
    ):
        if attribute in known:
            described[attribute] = value
    return described
