"""Operators written the way engines look for them compute the same, in float64, at a batch of another size."""

from functools import partial

import pytest
import torch
from fxcompress.passes.quantization.rewrites import (
    flatten_rows,
    pool_mean,
    slice_channels,
    slice_roll,
    split_attention,
    split_gate,
)
from fxcompress.passes.quantization.targets import ATTENTION
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from fxcompress import trace
from fxcompress.ir.ops import operations
from fxcompress.verification.verifier import verify

aten = torch.ops.aten


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, query, key, value, mask=None):
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, **self.options)


def tokens(heads=4, rows=5, width=6, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, heads, rows, width, dtype=torch.float64, generator=generator)


def rewritten(model, example, overload, rewrite):
    program = trace(model.double().eval(), example).copy()
    calls = [call for call in operations(program.graph_module) if call.overload is overload]
    assert len(calls) == 1
    assert rewrite(calls[0])
    program.graph_module.recompile()
    verify(program)
    assert all(call.overload is not ATTENTION for call in operations(program.graph_module))
    return program


def check(model, example, other, overload=ATTENTION, rewrite=split_attention):
    program = rewritten(model, example, overload, rewrite)
    for inputs in (example, other):
        torch.testing.assert_close(program(*inputs), model(*inputs), rtol=1e-12, atol=1e-12)


def three(batch, heads=4, shared=4, columns=5):
    return (tokens(heads, batch=batch), tokens(shared, columns, batch=batch, seed=1),
            tokens(shared, columns, batch=batch, seed=2))  # fmt: skip


def test_attention():
    check(Attention(), three(2), three(3))


def test_a_scale_of_its_own_and_another_number_of_keys():
    check(Attention(scale=0.3), three(2, columns=7), three(3, columns=7))


def test_causal():
    check(Attention(is_causal=True), three(2), three(3))
    check(Attention(is_causal=True), three(2, columns=8), three(3, columns=8))


def test_heads_that_share_keys_and_values():
    check(Attention(enable_gqa=True), three(2, shared=2), three(3, shared=2))


@pytest.mark.parametrize("heads", [1, 4])
def test_heads_that_share_keys_under_a_mask(heads):
    def masked(batch):
        return (
            *three(batch, shared=2),
            torch.rand(batch, heads, 5, 5, generator=torch.Generator().manual_seed(3)) > 0.3,
        )

    check(Attention(enable_gqa=True), masked(2), masked(3))


def test_a_row_that_may_see_nothing_gives_zero():
    def masked(batch):
        mask = torch.ones(batch, 1, 5, 5, dtype=torch.bool)
        mask[0, 0, 2] = False
        return (*three(batch), mask)

    check(Attention(), masked(2), masked(3))


def test_a_mask_that_is_added():
    def masked(batch):
        mask = tokens(1, 5, 5, batch=batch, seed=4)
        mask[0, 0, 1, 2:] = -torch.inf
        mask[1, 0, 3] = -torch.inf
        return (*three(batch), mask)

    check(Attention(), masked(2), masked(3))


def test_dropout_stays():
    program = trace(Attention(dropout_p=0.5).eval(), three(2)).copy()
    (call,) = (call for call in operations(program.graph_module) if call.overload is ATTENTION)
    assert not split_attention(call)


@pytest.mark.parametrize("shape", [(2, 5, 6), (2, 3, 5, 6)])
def test_a_linear_layer_of_more_dims(shape):
    def example(batch):
        return (torch.randn(batch, *shape[1:], dtype=torch.float64),)

    program = rewritten(nn.Linear(6, 4), example(2), aten.linear.default, flatten_rows)
    assert len([node for node in program.nodes if node.target is aten.sym_size.int]) == 0
    check(nn.Linear(6, 4), example(2), example(3), aten.linear.default, flatten_rows)


def test_a_linear_layer_with_two_dynamic_dims():
    torch.manual_seed(0)
    model = nn.Linear(6, 4).double()
    program = trace(model, torch.randn(2, 5, 6).double(), dynamic={"input": (1,)}).copy()
    (call,) = operations(program.graph_module)
    assert flatten_rows(call)
    program.graph_module.recompile()
    verify(program)
    for rows in ((2, 5), (3, 7)):
        x = torch.randn(*rows, 6).double()
        torch.testing.assert_close(program(x), model(x), rtol=1e-12, atol=1e-12)


def test_a_linear_layer_of_two_dims_stays():
    program = trace(nn.Linear(6, 4), torch.randn(2, 6)).copy()
    (call,) = operations(program.graph_module)
    assert not flatten_rows(call)


class Applied(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def image(batch, channels=5, height=4, width=3):
    generator = torch.Generator().manual_seed(batch)
    return (torch.randn(batch, channels, height, width, dtype=torch.float64, generator=generator),)


@pytest.mark.parametrize(
    ("activation", "overload", "gate"),
    [
        (torch.nn.functional.silu, aten.silu.default, aten.sigmoid.default),
        (torch.nn.functional.hardswish, aten.hardswish.default, aten.hardsigmoid.default),
    ],
)
def test_a_gated_activation(activation, overload, gate):
    check(Applied(activation), image(2), image(3), overload, partial(split_gate, gate=gate))


@pytest.mark.parametrize(
    ("function", "overload"),
    [
        (lambda x: x.mean((2, 3)), aten.mean.dim),
        (lambda x: x.mean((-1, 2), keepdim=True), aten.mean.dim),
        (nn.AdaptiveAvgPool2d(1), aten.adaptive_avg_pool2d.default),
    ],
)
def test_the_mean_of_an_image(function, overload):
    check(Applied(function), image(2), image(3), overload, pool_mean)


@pytest.mark.parametrize(
    ("function", "overload", "example", "dynamic"),
    [
        (lambda x: x.mean((1, 2)), aten.mean.dim, image(2), None),
        (lambda x: x.mean((1, 2)), aten.mean.dim, (image(2)[0][0],), None),
        (lambda x: x.mean((2, 3), dtype=torch.float32), aten.mean.dim, image(2), None),
        (nn.AdaptiveAvgPool2d(2), aten.adaptive_avg_pool2d.default, image(2), None),
        (lambda x: x.mean((2, 3)), aten.mean.dim, image(2), {"x": (2,)}),
    ],
)
def test_other_means_stay(function, overload, example, dynamic):
    program = trace(Applied(function), example, dynamic=dynamic).copy()
    (call,) = (call for call in operations(program.graph_module) if call.overload is overload)
    assert not pool_mean(call)


@pytest.mark.parametrize(
    ("function", "overload"),
    [
        (lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), aten.chunk.default),
        (lambda x: torch.cat(x.split([1, 3, 1], -3)[1:], 1), aten.split_with_sizes.default),
        (lambda x: x.split(2, 1)[-1], aten.split.Tensor),
    ],
)
def test_pieces_of_the_channels_of_an_image(function, overload):
    check(Applied(function), image(2), image(3), overload, slice_channels)


@pytest.mark.parametrize(
    ("function", "example"),
    [
        (lambda x: x.chunk(2, 2)[1], image(2)),
        (lambda x: x.chunk(2, 1)[1], (image(2)[0][0],)),
        (lambda x: x.chunk(2)[1], (image(2)[0][0, 0, 0],)),
    ],
)
def test_other_pieces_stay(function, example):
    program = trace(Applied(function), example).copy()
    (call,) = (call for call in operations(program.graph_module) if call.overload is aten.chunk.default)
    assert not slice_channels(call)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.roll(1, 1),
        lambda x: x.roll((-2, 3), (2, -1)),
        lambda x: x.roll((7, 5, -1), (2, 1, 2)),  # once around, not at all, and one dim twice
    ],
)
def test_a_roll(function):
    check(Applied(function), image(2), image(3), aten.roll.default, slice_roll)


@pytest.mark.parametrize("function", [lambda x: x.roll(3), lambda x: x.roll(5, 1), lambda x: x.roll(1, 0)])
def test_other_rolls_stay(function):
    program = trace(Applied(function), image(2)).copy()
    (call,) = (call for call in operations(program.graph_module) if call.overload is aten.roll.default)
    assert not slice_roll(call), "of the flat tensor, by nothing, or along a batch of any size"
