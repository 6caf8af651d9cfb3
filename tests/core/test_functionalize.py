"""In-place operations become functional, and every alias sees the write."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxcompress as fxc
from fxcompress.tracing.functionalize import is_mutating
from fxcompress.verification.numerics import compare_outputs


class InPlace(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.linear = nn.Linear(4, 6)

    def forward(self, x):
        return self.function(self.linear(x))


def relu_(y):
    return y.relu_()


def write_to_slice(y):
    y[:, 1:3] = 0
    return y


def add_to_slice_of_slice(y):
    y[:, 1:][:, ::2] += 1
    return y


def write_to_element(y):
    y[:, 2].mul_(3)
    return y


def write_through_reshape(y):
    y.view(-1, 2, 3)[:, 1].zero_()
    return y


def write_through_transpose(y):
    y.t()[0] = 5
    return y


def write_through_permute(y):
    z = y.view(-1, 2, 3).permute(2, 0, 1)
    z[1] += z[0]
    return y


def write_then_read_an_older_view(y):
    view = y[:, :3]
    y.mul_(2)
    return view + 1, y


def write_view_then_read_sibling(y):
    left, whole = y[:, :4], y[:, 2:]
    left.add_(1)
    return whole, left, y


def write_chunk_argument(y):
    z = y * 1
    a = z[:, :3]
    a += z[:, 3:]
    return z


def write_unsqueezed(y):
    y.unsqueeze(1).add_(2)
    return y


def copy_with_broadcast_and_cast(y):
    y[:, :2].copy_(torch.arange(2))
    return y


def masked_and_indexed(y):
    y.masked_fill_(y > 0.5, 0.0)
    y[torch.tensor([0]), torch.tensor([1])] = 7.0
    return y


def write_keeps_the_dtype_of_its_target(y):
    z = y.to(torch.float16)
    z.add_(y)
    return z


def write_to_a_fresh_tensor(y):
    out = torch.zeros_like(y)
    out[:, ::2] = y[:, 1::2]
    return out


def twice(y):
    y[:, 0] = 1
    z = y + 1
    y[:, 0] = 2
    return z, y


def augmented_and(y):
    mask = y > 0
    mask &= y < 0.5
    return mask * y


CASES = [
    relu_, write_to_slice, add_to_slice_of_slice, write_to_element, write_through_reshape, write_through_transpose,
    write_through_permute, write_then_read_an_older_view, write_view_then_read_sibling, write_chunk_argument,
    write_unsqueezed, copy_with_broadcast_and_cast, masked_and_indexed, write_keeps_the_dtype_of_its_target,
    write_to_a_fresh_tensor, twice, augmented_and,
]  # fmt: skip


@pytest.mark.parametrize("function", CASES, ids=lambda f: f.__name__)
def test_a_write_reaches_every_alias(function):
    model, x = InPlace(function).eval(), torch.randn(3, 4)
    program = fxc.trace(model, x)
    assert not any(is_mutating(node) for node in program.nodes)
    for rows in (3, 5):
        x = torch.randn(rows, 4)
        expected, found = model(x), program(x)
        many = expected if isinstance(expected, tuple) else (expected,)
        assert compare_outputs(list(many), list(found) if isinstance(found, tuple) else [found]).exact


def test_the_caller_s_input_is_not_written():
    class Writes(nn.Module):
        def forward(self, x):
            return x.mul_(2) + 1

    program = fxc.trace(Writes(), torch.ones(2, 3))
    x = torch.ones(2, 3)
    assert torch.equal(program(x), torch.full((2, 3), 3.0))
    assert torch.equal(x, torch.ones(2, 3))


def test_writing_into_a_buffer_is_refused():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.seen.add_(1)
            return x + self.seen

    with pytest.raises(fxc.CaptureError, match="seen"):
        fxc.trace(Counts(), torch.randn(2, 3))


def test_a_write_without_functional_form_is_refused():
    class Strided(nn.Module):
        def forward(self, x):
            y = x * 1
            y.as_strided((2,), (1,)).add_(1)
            return y

    with pytest.raises(fxc.CaptureError, match="as_strided"):
        fxc.trace(Strided(), torch.randn(2, 3))


VIEWS = {
    "whole": lambda y: y,
    "columns": lambda y: y[:, 1:4],
    "even": lambda y: y[:, ::2],
    "column": lambda y: y[:, 2],
    "transposed": lambda y: y.t(),
    "blocks": lambda y: y.view(y.shape[0], 2, 3),
    "block columns": lambda y: y.view(y.shape[0], 2, 3)[:, :, 1],
    "last": lambda y: y[:, -1:],
}
WRITES = {
    "double": lambda v: v.mul_(2),
    "add": lambda v: v.add_(1),
    "negate": lambda v: v.neg_(),
    "fill": lambda v: v.fill_(0.5),
}


@given(st.lists(st.tuples(st.sampled_from(sorted(VIEWS)), st.sampled_from(sorted(WRITES))), min_size=1, max_size=4))
@settings(max_examples=15, deadline=None)
def test_any_sequence_of_writes_through_views(steps):
    def function(y):
        views = [VIEWS[view](y) for view, _ in steps]
        for view, (_, write) in zip(views, steps, strict=True):
            WRITES[write](view)
        return y, *views

    model, x = InPlace(function).eval(), torch.randn(3, 4)
    program = fxc.trace(model, x)
    assert not any(is_mutating(node) for node in program.nodes)
    assert compare_outputs(list(model(x)), list(program(x))).exact
