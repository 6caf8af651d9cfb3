"""Bugs planted in removal: the pipeline must refuse each of them, and accept the same model without it."""

import dataclasses

import numpy as np
import pytest
import torch
from fxcompress.passes.channels import literals, removal, rewrites, rules
from fxcompress.passes.channels.layout import is_position
from models import inputs, settled
from pruning import Wire, weight
from torch import nn
from torch.nn import functional as F

import fxcompress as fxc
from fxcompress.errors import VerificationError
from fxcompress.verification import oracle

aten = torch.ops.aten
IMAGE, TOKENS = inputs(2, 3, 8, 8), inputs(2, 5, 8)


def conv(c_in, c_out, kernel=1, **options):
    return nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, **options)


def between(function, **layers):
    """A function of 16 channels between two convolutions."""
    return Wire(lambda m, x: m.head(function(m, m.stem(x))), stem=conv(3, 16), **layers, head=nn.LazyConv2d(2, 1))


def attention():
    def forward(m, x):
        query, key, value = (layer(x).view(*x.shape[:2], 4, 4).transpose(1, 2) for layer in (m.q, m.k, m.v))
        return m.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))

    return Wire(forward, **{name: nn.Linear(8, 16) for name in "qkv"}, out=nn.Linear(16, 3))


def by_hand():
    def forward(m, x):
        query, key, value = (layer(x).view(*x.shape[:2], 4, 8).transpose(1, 2) for layer in (m.q, m.k, m.v))
        return m.out(((query @ key.transpose(-2, -1)).softmax(-1) @ value).transpose(1, 2).flatten(2))

    return Wire(forward, **{name: nn.Linear(8, 32) for name in "qkv"}, out=nn.Linear(32, 3))


def no_rewrite(overload):
    def plant(patch):
        patch.delitem(rewrites._REWRITES, overload.name())

    return plant


def off_by_one(patch):
    right = literals._before
    patch.setattr(literals, "_before", lambda kept, place: right(kept, place) - 1)


def one_too_far(patch):
    right = literals.look_up

    def wrong(edit, source, dim, kept, chosen):
        right(edit, source, dim, kept, np.roll(chosen, 1))

    patch.setattr(literals, "look_up", wrong)


def slicing(change):
    """Slices parameters otherwise, with as many elements."""

    def plant(patch):
        right = removal.sliced
        patch.setattr(removal, "sliced", lambda tensor, places, *room: right(tensor, change(tensor, places), *room))

    return plant


def first(places):
    return None if places is None else torch.arange(len(places))


def pieces_exchanged(patch):
    right = rewrites.Edit.replace

    def wrong(edit, overload, *args):
        source, sizes, *rest = args
        right(edit, overload, source, sizes[::-1] if isinstance(sizes, list) else sizes, *rest)

    patch.setattr(rewrites.Edit, "replace", wrong)


def padding_on_the_other_side(patch):
    right = rewrites.Edit.set

    def wrong(edit, name, value):
        right(edit, name, [*value[:-2], value[-1], value[-2]] if name == "pad" else value)

    patch.setattr(rewrites.Edit, "set", wrong)


def more_groups(patch):
    right = rewrites.Edit.rows
    patch.setattr(rewrites.Edit, "rows", lambda edit, dim, outer: 2 * right(edit, dim, outer))


def heads_and_dims_exchanged(patch):
    right = rewrites.Edit.set

    def wrong(edit, name, value):
        right(edit, name, [*value[:2], value[3], value[2]] if name == "shape" and len(value) == 4 else value)

    patch.setattr(rewrites.Edit, "set", wrong)


def wrong_permutation(patch):
    right = removal._permute

    def wrong(root, node, report, removed):
        other = dataclasses.replace(report.permutations[node.name], index=report.permutations[node.name].index[::-1])
        right(root, node, dataclasses.replace(report, permutations={node.name: other}), removed)

    patch.setattr(removal, "_permute", wrong)


def sums_that_join_nothing(patch):
    patch.setattr(rules, "pointwise", lambda call: call.operands()[0])


def layers_that_join_no_inputs(patch):
    def linear(call):
        if is_position(call.layout("input")[-1]):
            call.keep(call.layout("weight")[1])
        call.join(call.layout("weight")[0], call.layout("bias")[0])
        return (*call.layout("input")[:-1], call.layout("weight")[0])

    patch.setitem(rules._RULES, "aten::linear", linear)


def shuffled(x):
    return x.view(x.shape[0], 4, 4, *x.shape[2:]).transpose(1, 2).reshape(x.shape)


BUGS = {
    "an off-by-one index in a slice": (lambda: between(lambda m, x: x[:, 3:13]), IMAGE, off_by_one),
    "an off-by-one index in a narrow": (lambda: between(lambda m, x: x.narrow(1, 3, 10)), IMAGE, off_by_one),
    "a lookup one too far": (lambda: between(lambda m, x: x[:, ::2]), IMAGE, one_too_far),
    "a lookup of a constant index one too far": (
        lambda: between(lambda m, x: x.flip(1).roll(3, 1)),
        IMAGE,
        one_too_far,
    ),
    "a bias that was forgotten": (
        lambda: between(lambda m, x: x),
        IMAGE,
        slicing(lambda tensor, places: [first(each) for each in places] if tensor.dim() == 1 else places),
    ),
    "wrong rows": (
        lambda: between(lambda m, x: x),
        IMAGE,
        slicing(lambda tensor, places: [first(places[0]), *places[1:]] if tensor.dim() == 4 else places),
    ),
    "wrong columns": (
        lambda: between(lambda m, x: x),
        IMAGE,
        slicing(lambda tensor, places: [places[0], *map(first, places[1:])]),
    ),
    "statistics of other channels": (
        lambda: between(lambda m, x: m.norm(x), norm=nn.BatchNorm2d(16)),
        IMAGE,
        slicing(
            lambda tensor, places: places if isinstance(tensor, nn.Parameter) else [first(each) for each in places]
        ),
    ),
    "pieces of a split exchanged": (
        lambda: between(lambda m, x: sum(part.mean(1, keepdim=True) for part in x.split([6, 10], 1))),
        IMAGE,
        pieces_exchanged,
    ),
    "padding on the other side": (
        lambda: between(lambda m, x: m.wide(x) + F.pad(x, (0, 0, 0, 0, 6, 2)), wide=conv(16, 24)),
        IMAGE,
        padding_on_the_other_side,
    ),
    "groups of a convolution": (lambda: between(lambda m, x: m.g(x), g=conv(16, 16, 3, groups=4)), IMAGE, more_groups),
    "groups of a group norm": (lambda: between(lambda m, x: m.g(x), g=nn.GroupNorm(4, 16)), IMAGE, more_groups),
    "heads and head dims exchanged": (by_hand, TOKENS, heads_and_dims_exchanged),
    "a scale of attention that moved": (attention, TOKENS, no_rewrite(aten.scaled_dot_product_attention.default)),
    "a wrong permutation": (lambda: between(lambda m, x: shuffled(x)), IMAGE, wrong_permutation),
    "a sum whose operands lose other channels": (
        lambda: between(lambda m, x: m.a(x) + m.b(x), a=conv(16, 8), b=conv(16, 8)),
        IMAGE,
        sums_that_join_nothing,
    ),
    "a layer that loses other inputs than come": (
        lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)),
        TOKENS,
        layers_that_join_no_inputs,
    ),
}


def prune(model, x):
    torch.manual_seed(0)
    with torch.no_grad():
        model.double()(x)  # lazy layers
    return fxc.PassManager("select-channels,remove-channels").run(fxc.trace(settled(model), x)).program


@pytest.mark.parametrize("bug", BUGS)
def test_is_refused(bug, monkeypatch):
    model, x, plant = BUGS[bug]
    prune(model(), x)

    plant(monkeypatch)

    with pytest.raises(RuntimeError if "groups of a conv" in bug else VerificationError):
        prune(model(), x)


NORMALISERS = {
    aten.layer_norm.default: lambda m, x: F.layer_norm(x, (16,), m.gain),
    aten.rms_norm.default: lambda m, x: F.rms_norm(x, (16,), m.gain),
    aten.group_norm.default: lambda m, x: F.group_norm(x.transpose(1, 2), 2, m.gain).transpose(1, 2),
    aten.softmax.int: lambda m, x: x.softmax(-1) * m.gain,
    aten.mean.dim: lambda m, x: x - x.mean(-1, keepdim=True) * m.gain,
    aten.var.correction: lambda m, x: x * x.var(-1, correction=0, keepdim=True) * m.gain,
    aten.amin.default: lambda m, x: x - x.square().amin(-1, keepdim=True) * m.gain,
}


@pytest.mark.parametrize("overload", NORMALISERS, ids=str)
def test_counting_what_is_gone_is_refused(overload, monkeypatch):
    def model():
        forward = NORMALISERS[overload]
        return Wire(
            lambda m, x: m.head(forward(m, m.stem(x).cos())),
            stem=nn.Linear(8, 16),
            gain=weight(16),
            head=nn.Linear(16, 3),
        )

    prune(model(), TOKENS)

    monkeypatch.delitem(oracle._KEPT_ONLY, overload)

    with pytest.raises(VerificationError, match="removal must leave what the masked model computes"):
        prune(model(), TOKENS)
