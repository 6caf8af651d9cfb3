"""What a layer's filters see: for sampled places of its output, the inputs under the filters and the wanted outputs.

A convolution, a transposed convolution and a linear layer are, at each place and in each group, the product of a matrix
of filters with the vector of inputs that the filters cover.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from fxcompress.ir.weighted import WeightedLayer


@dataclass(frozen=True, eq=False)
class Patches:
    """Sampled places of one batch.

    Attributes:
        inputs: ``(places, groups, inputs per group, taps)``.
        outputs: ``(places, groups, outputs per group)``.
        position: For each place how far into the batch it is, from 0 to below 1; places of one sample stay together.
    """

    inputs: torch.Tensor
    outputs: torch.Tensor
    position: torch.Tensor


def sample(
    layer: WeightedLayer,
    x: torch.Tensor,
    y: torch.Tensor,
    keeps: dict[int, torch.Tensor],
    count: int,
    generator: torch.Generator,
) -> Patches:
    """Draws places of a layer's output, each at most once.

    Args:
        layer: The layer.
        x: Its input.
        y: Its output as it should be.
        keeps: Dim of ``y`` -> which of its elements are kept; places that are not are never drawn.
        count: How many places to draw; all if there are fewer.
        generator: Source of randomness.
    """
    groups, spatial = layer.layout.groups, layer.layout.spatial
    channel = layer.layout.channel_dim(y.dim())
    places, total = _kept_places(y, channel, keeps)
    if len(places) > count:
        places = places[torch.randperm(len(places), generator=generator)[:count].sort().values]
    on_device = places.to(y.device)
    outputs = y.movedim(channel, -1).reshape(total, -1)[on_device]
    if spatial == 0:
        inputs = x.reshape(total, -1, 1)[on_device]
    else:
        inputs = _windows(layer, x if x.dim() == spatial + 2 else x[None], on_device)
    return Patches(
        _single(inputs).reshape(len(places), groups, -1, inputs.shape[-1]),
        _single(outputs).reshape(len(places), groups, -1),
        places.double() / total,
    )


def _single(tensor: torch.Tensor) -> torch.Tensor:
    """Half precision is too coarse for sums of products."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _kept_places(y: torch.Tensor, channel: int, keeps: dict[int, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """Flat indices of the places at which nothing is removed, and the number of all places."""
    shape = [size for dim, size in enumerate(y.shape) if dim != channel]
    mask = torch.ones(shape, dtype=torch.bool)
    for dim, keep in keeps.items():
        if dim != channel:
            place = dim if dim < channel else dim - 1
            mask &= keep.cpu().reshape([-1 if index == place else 1 for index in range(len(shape))])
    return mask.flatten().nonzero().flatten(), mask.numel()


def _windows(layer: WeightedLayer, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """``(places, channels, taps)`` of a convolution's input; only what is asked for is copied."""
    call, spatial = layer.operation, layer.layout.spatial
    kernel, dilation = layer.kernel, call["dilation"]
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    stride = list(call["stride"])
    if layer.layout.transposed:
        x = _spread(x, stride)
        low = [r - p for r, p in zip(reach, call["padding"], strict=True)]
        high = [edge + extra for edge, extra in zip(low, call["output_padding"], strict=True)]
        stride = [1] * spatial
    else:
        low, high = _padding(call["padding"], reach)
    x = functional.pad(x, [edge for pair in zip(reversed(low), reversed(high), strict=True) for edge in pair])
    for index, (r, s, d) in enumerate(zip(reach, stride, dilation, strict=True)):
        x = x.unfold(2 + index, r + 1, s)[..., ::d]
    batch, *where = torch.unravel_index(places, (x.shape[0], *x.shape[2 : 2 + spatial]))
    at: tuple[Any, ...] = (batch, slice(None), *where)
    found = x[at]
    if layer.layout.transposed:
        found = found.flip(tuple(range(2, 2 + spatial)))
    return found.reshape(len(places), x.shape[1], math.prod(kernel))


def _padding(padding: str | list[int], reach: list[int]) -> tuple[list[int], list[int]]:
    if padding == "valid":
        return [0] * len(reach), [0] * len(reach)
    if padding == "same":
        low = [r // 2 for r in reach]
        return low, [r - edge for r, edge in zip(reach, low, strict=True)]
    assert not isinstance(padding, str)
    return list(padding), list(padding)


def _spread(x: torch.Tensor, stride: list[int]) -> torch.Tensor:
    """The input of a transposed convolution with ``stride - 1`` zeros between its elements."""
    sizes = [(size - 1) * s + 1 for size, s in zip(x.shape[2:], stride, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *sizes)
    index: tuple[Any, ...] = (..., *(slice(None, None, s) for s in stride))
    spread[index] = x
    return spread
