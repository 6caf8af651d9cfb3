"""Operators written the way engines look for them compute the same, in float64, at a batch of another size."""

import pytest
import torch
from fxcompress.passes.quantization.rewrites import flatten_rows, split_attention
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
