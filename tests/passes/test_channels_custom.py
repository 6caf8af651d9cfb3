"""Operators that the library does not know: barriers with a name, until their user writes a rule."""

import textwrap

import pytest
import torch
from fxcompress.passes.channels import rewrites, rules
from fxcompress.passes.channels.layout import Layout
from fxcompress.passes.channels.rules import Call, replaced, rule
from models import inputs, settled
from pruning import Wire, lengths, prune, shapes, weight
from torch import nn

import fxcompress as fxc
from fxcompress.errors import InputError

IMAGE = inputs(2, 3, 6, 6)


@torch.library.custom_op("unknown::mystery", mutates_args=())
def mystery(x: torch.Tensor) -> torch.Tensor:
    return x.flip(1).contiguous()


@mystery.register_fake
def _(x):
    return torch.empty_like(x)


mystery.register_autograd(lambda ctx, gradient: gradient.flip(1))


@torch.library.custom_op("mine::scale_channels", mutates_args=())
def scale_channels(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x * scale[:, None, None]


@scale_channels.register_fake
def _(x, scale):
    return torch.empty_like(x)


def _saved(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


scale_channels.register_autograd(
    lambda ctx, gradient: (
        gradient * ctx.saved_tensors[1][:, None, None],
        (gradient * ctx.saved_tensors[0]).sum((0, 2, 3)),
    ),
    setup_context=_saved,
)


@torch.library.custom_op("mine::tile_channels", mutates_args=())
def tile_channels(x: torch.Tensor, channels: int) -> torch.Tensor:
    return x.repeat(1, channels, 1, 1)


@tile_channels.register_fake
def _(x, channels):
    return x.new_empty(x.shape[0], channels, *x.shape[2:])


tile_channels.register_autograd(lambda ctx, gradient: (gradient.sum(1, keepdim=True), None))


def example(module):
    """The code in a module's docstring."""
    lines = module.__doc__.splitlines()
    code = [line for line in lines if line.startswith("    ") or not line]
    return textwrap.dedent("\n".join(code))


def test_an_unknown_operator_is_a_barrier_that_is_named():
    model = Wire(
        lambda m, x: m.head(torch.ops.unknown.mystery(m.body(m.stem(x)))),
        stem=nn.Conv2d(3, 8, 1), body=nn.Conv2d(8, 8, 1), head=nn.Conv2d(8, 2, 1),
    )  # fmt: skip
    report = fxc.trace(settled(model), IMAGE).analyze("channels")

    (found,) = report.diagnostics
    assert found.code == "unknown-operator"
    assert found.path == "mystery"
    assert "unknown.mystery.default has no dependency rule" in found.message
    assert list(report.barriers("body.weight", 0)) == ["mystery"]
    assert list(report.barriers("head.weight", 1)) != []
    assert shapes(prune(Wire(model.wiring, **dict(model.named_children())), IMAGE)) == {
        "stem": (4, 3, 1, 1), "body": (8, 4, 1, 1), "head": (2, 8, 1, 1),
    }  # fmt: skip


def test_the_example_of_a_rule_makes_its_operator_removable():
    model = Wire(
        lambda m, x: m.head(torch.ops.mine.scale_channels(m.stem(x), m.scale)),
        stem=nn.Conv2d(3, 8, 1), scale=weight(8), head=nn.Conv2d(8, 2, 1),
    )  # fmt: skip
    exec(example(rules), {"torch": torch})

    after = prune(model, IMAGE)

    assert shapes(after) == {"stem": (4, 3, 1, 1), "head": (2, 4, 1, 1)}
    assert lengths(after)["scale"] == 4


def test_a_rule_that_gives_other_sizes_makes_a_barrier_that_is_named(monkeypatch):
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))

    @rule(torch.ops.unknown.mystery.default)
    def turned(call: Call) -> Layout:
        x = call.layout("x")
        return (*x[:-3], *reversed(x[-3:]))

    model = Wire(
        lambda m, x: m.head(torch.ops.unknown.mystery(m.stem(x))), stem=nn.Conv2d(3, 8, 1), head=nn.Conv2d(8, 2, 1)
    )
    report = fxc.trace(settled(model), IMAGE).analyze("channels")

    (found,) = report.diagnostics
    assert (found.code, found.path) == ("wrong-rule", "mystery")
    assert "unknown.mystery.default has a dependency rule that gives dims of" in found.message
    assert report.groups == ()


def test_the_example_of_a_rewrite_follows_the_new_size():
    @rule(torch.ops.mine.tile_channels.default)
    def copies(call: Call) -> Layout:
        return replaced(call.layout("x"), {1: call.fresh(call["channels"])})

    exec(example(rewrites), {"torch": torch})
    model = Wire(
        lambda m, x: m.head(m.stem(x) + torch.ops.mine.tile_channels(m.one(x), 8)),
        stem=nn.Conv2d(3, 8, 1), one=nn.Conv2d(3, 1, 1), head=nn.Conv2d(8, 2, 1),
    )  # fmt: skip

    after = prune(model, IMAGE)

    assert shapes(after) == {"stem": (4, 3, 1, 1), "one": (1, 3, 1, 1), "head": (2, 4, 1, 1)}
    assert "mine.tile_channels(%one, 4)" in after.text()


def test_an_operator_has_one_rule_and_one_rewrite():
    with pytest.raises(InputError, match="linear has a rule already: linear"):
        rule(torch.ops.aten.linear.default)(lambda call: ())
    with pytest.raises(InputError, match=r"aten::slice.Tensor has a rewrite already: slice_"):
        rewrites.rewrite(torch.ops.aten.slice.Tensor)(lambda edit: None)
