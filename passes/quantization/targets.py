"""Targets: what each engine computes in integers, as data.

An engine has an integer kernel for an operator only in a certain surrounding, and only what is written the way it looks
for is found. A profile says which operands an operator may read as integers, what passes integers through as they are,
what must agree, and how an operator has to be written; :mod:`fxcompress.passes.quantization.placement` does the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from fxcompress.passes.quantization.grid import Grid
from torch._ops import OpOverload

from fxcompress.errors import InputError, did_you_mean

aten = torch.ops.aten

ATTENTION = aten.scaled_dot_product_attention.default
ATTENTION_OPERANDS = ("query", "key", "value")

Operands = Mapping[OpOverload, tuple[str, ...]]
"""Operator -> names of its operands."""

CONVOLUTIONS = (
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.conv3d.padding,
)
VOLUMES = frozenset({aten.conv3d.default, aten.conv3d.padding})
TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
LAYERS: Operands = {
    **dict.fromkeys(CONVOLUTIONS, ("input",)),
    aten.linear.default: ("input",),
}
PRODUCTS: Operands = {aten.matmul.default: ("self", "other"), aten.bmm.default: ("self", "mat2")}
GATED: Operands = {aten.mul.Tensor: ("self", "other")}
ELEMENTWISE: Operands = {aten.add.Tensor: ("self", "other"), **GATED}
AVERAGES: Operands = {aten.avg_pool2d.default: ("self",), aten.adaptive_avg_pool2d.default: ("self",)}
MEANS: Operands = {**AVERAGES, aten.mean.dim: ("self",)}
NORMS: Operands = {aten.batch_norm.default: ("input",)}

PIECES = frozenset(
    {aten.chunk.default, aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.tensor_split.sections}
)
"""Operators that give several pieces of a value."""

CLAMPS = frozenset({aten.relu.default, aten.hardtanh.default, aten.relu6.default, aten.clamp.default})
"""Activations that every engine computes together with the layer before them."""

ACTIVATIONS = CLAMPS | {
    aten.elu.default,
    aten.gelu.default,
    aten.hardsigmoid.default,
    aten.hardswish.default,
    aten.leaky_relu.default,
    aten.mish.default,
    aten.prelu.default,
    aten.sigmoid.default,
    aten.silu.default,
    aten.softplus.default,
    aten.tanh.default,
}
"""Those that an engine computes so which compiles what follows a layer into its kernel."""

VIEWS = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.permute.default,
        aten.transpose.int,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unsqueeze.default,
        aten.expand.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.contiguous.default,
        aten.clone.default,
        aten.dropout.default,
        aten.max_pool2d.default,
        aten.pixel_shuffle.default,
        aten.channel_shuffle.default,
    }
)
"""Each element of the result is one of the operand: integers go through with the same scale."""


PADS = frozenset({aten.pad.default, aten.constant_pad_nd.default})
"""Zeros around an image: integers go through to a convolution, which ONNX files write as its padding."""


@dataclass(frozen=True)
class Target:
    """What an engine computes in integers.

    Attributes:
        layers: Operators with a weight, which becomes integers too, and the operands that they always read as integers.
        products: Operators that multiply values, and the operands that they always read as integers.
        carriers: Operator -> the operands that it reads as integers where its result is read so as well.
        fused: Activations and norms that are computed with the operator before them.
        views: Operators that pass integers through.
        joins: Operators that pass integers through if all operands have one scale and zero point.
        closed: Operators whose integer kernels also give integers, to all who read the result. Not sums, which are then
            computed in floating point: a stream would be rounded each time that something is added to it, also for
            norms that read it in floating point, on behalf of the one that wants integers.
        grid: The integers that values become.
        factor: The integers that the second factor of a product becomes.
        splits_attention: Whether attention must be written as products for the engine to find them.
        gates: Activation -> the gate that it multiplies its operand by, where the engine has integer kernels for that
            gate and for products, and none for the activation.
        pools_means: Whether the mean of an image must be written as a pool for the engine to compute it in integers.
        slices: Whether pieces of an image's channels, and rolls, must be written as slices for integers to go through.
        rounds_biases: Whether the biases of layers whose results become integers are rounded to steps of the product of
            the scales of input and weight.
        flattens_rows: Whether a linear layer must be written with two dims for the engine to compute its bias with it.
        slow: Operators that take longer in integers than in float32 where the processor has no VNNI.
    """

    layers: Operands
    products: Operands
    carriers: Operands
    fused: frozenset[OpOverload]
    views: frozenset[OpOverload]
    joins: frozenset[OpOverload]
    closed: frozenset[OpOverload] = frozenset()
    grid: Grid = field(default_factory=Grid)
    factor: Grid = field(default_factory=Grid)
    splits_attention: bool = True
    gates: Mapping[OpOverload, OpOverload] = field(default_factory=dict)
    pools_means: bool = False
    slices: bool = False
    rounds_biases: bool = False
    flattens_rows: bool = False
    slow: frozenset[OpOverload] = frozenset()

    @cached_property
    def computed(self) -> frozenset[OpOverload]:
        """The operators that it computes in integers, or together with such."""
        return self.fused.union(self.layers, self.products, self.carriers)

    def without_slow(self) -> Target:
        """The profile for processors without VNNI: what is slow there stays in floating point."""
        layers, products = (
            {overload: names for overload, names in operands.items() if overload not in self.slow}
            for operands in (self.layers, self.products)
        )
        splits_attention = self.splits_attention and ATTENTION not in self.slow
        return replace(self, layers=layers, products=products, splits_attention=splits_attention)

    def reads(self, overload: OpOverload) -> tuple[str, ...]:
        """The operands that an operator always reads as integers."""
        return self.layers.get(overload) or self.products.get(overload, ())


_CAT = frozenset({aten.cat.default})
_SYMMETRIC = Grid(symmetric=True)
_SIGNED = Grid(signed=True)

TARGETS: Mapping[str, Target] = {
    "openvino": Target(
        layers={**LAYERS, **dict.fromkeys(TRANSPOSED, ("input",))},
        products=PRODUCTS,
        carriers={**ELEMENTWISE, **MEANS, **NORMS},
        fused=ACTIVATIONS | NORMS.keys(),
        views=VIEWS,
        joins=_CAT,
        grid=_SYMMETRIC,
        factor=_SYMMETRIC,
        slices=True,
        slow=frozenset({aten.linear.default, *PRODUCTS, ATTENTION}),  # 0.8 to 0.95 of float32's speed with AVX2
    ),
    "onnxruntime": Target(  # its kernels for a signed first factor are many times slower where there is no VNNI
        layers=LAYERS,
        products=PRODUCTS,
        carriers={**ELEMENTWISE, **AVERAGES, aten.leaky_relu.default: ("self",)},
        fused=CLAMPS,
        views=VIEWS,
        joins=_CAT,
        closed=frozenset({*CONVOLUTIONS, *GATED, *AVERAGES}),
        factor=_SYMMETRIC,
        gates={aten.silu.default: aten.sigmoid.default, aten.hardswish.default: aten.hardsigmoid.default},
        pools_means=True,
        rounds_biases=True,
        slices=True,
        flattens_rows=True,
    ),
    "x86": Target(  # Inductor looks for integers right before a layer, and computes the rest in code of its own
        layers={overload: names for overload, names in LAYERS.items() if overload not in VOLUMES},
        products={},
        carriers={},
        fused=CLAMPS,
        views=frozenset(),
        joins=frozenset(),
        splits_attention=False,
    ),
    "executorch": Target(  # XNNPACK: signed affine activations, every kernel from integers to integers
        layers=LAYERS,
        products={},
        carriers={**ELEMENTWISE, **MEANS},
        fused=CLAMPS,
        views=VIEWS,
        joins=_CAT,
        closed=frozenset({*LAYERS, *GATED, *MEANS}),
        grid=_SIGNED,
        factor=_SIGNED,
        splits_attention=False,
    ),
}  # fmt: skip
"""Name -> profile."""


def target_of(name: str) -> Target:
    """The profile of that name.

    Raises:
        InputError: There is none; near names are given.
    """
    if name not in TARGETS:
        near = did_you_mean(name, TARGETS) or f"; targets: {', '.join(sorted(TARGETS))}"
        raise InputError(f"there is no quantization target {name!r}{near}")
    return TARGETS[name]
