"""Criteria that read weights alone: what each measures, against sums written out by hand."""

import pytest
import torch
from models import inputs, settled
from scoring import IMAGES, Attention, Stack, agree, scored, traced
from torch import nn

import fxcompress as fxc
from fxcompress.errors import InputError


@pytest.mark.parametrize(("name", "each"), [("l1", torch.abs), ("l2", torch.square)])
def test_norms_add_up_all_that_goes_with_a_channel(name, each):
    model = settled(Stack())

    found = scored(fxc.trace(model, IMAGES), name)

    makers = each(model.conv1.weight).sum((1, 2, 3)) + each(model.conv1.bias)
    norm, readers = each(model.bn.weight) + each(model.bn.bias), each(model.conv2.weight).sum((0, 2, 3))
    agree(found, (makers + norm + readers) / 5)


def test_a_tied_weight_counts_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(4, 6, bias=False), nn.Linear(6, 4, bias=False)
            self.again = nn.Linear(4, 6, bias=False)
            self.again.weight = self.up.weight

        def forward(self, x):
            return self.down(self.up(x).relu() + self.again(x))

    model = settled(Tied())

    agree(
        scored(traced(model, inputs(2, 4)), "l2"),
        (model.up.weight.square().sum(1) + model.down.weight.square().sum(0)) / 2,
    )


def test_a_head_counts_with_all_its_dims_and_a_dim_with_all_its_heads():
    model = settled(Attention())
    before = traced(model, inputs(2, 7, 4))
    names = {(group.name, group.factor): number for number, group in enumerate(before.analyze("channels").groups)}

    heads = scored(before, "l2", group=names["q.weight:0", "outer"])
    dims = scored(before, "l2", group=names["q.weight:0", "inner"])

    q, k, v = (layer.weight.square().sum(1).reshape(2, 3) for layer in (model.q, model.k, model.v))
    out = model.out.weight.square().sum(0).reshape(2, 3)
    agree(heads, (q + k + v + out).sum(1) / 4)
    agree(dims, (q + k).sum(0) / 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_reduced_precision_is_summed_in_single_precision_or_better(dtype):
    model = nn.Sequential(nn.Linear(70_000, 3), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight.fill_(0.01)
        model[0].bias.zero_()
        model[1].weight.zero_()
    before = fxc.trace(model.to(dtype).eval(), torch.zeros(2, 70_000, dtype=dtype))

    exact = 70_000 * model[0].weight[0, 0].double() ** 2 / 3

    torch.testing.assert_close(scored(before, "l2"), exact.expand(3), rtol=1e-5, atol=0)


def test_lamp_divides_by_what_is_no_smaller():
    before = traced(Stack())
    squares = scored(before, "l2")

    expected = [squares[i] / squares[squares >= squares[i]].sum() for i in range(5)]

    agree(scored(before, "lamp"), torch.stack(expected))


def test_bn_gamma_is_the_scale():
    model = settled(Stack())

    agree(scored(traced(model), "bn-gamma"), model.bn.weight.abs())


def test_bn_gamma_says_nothing_of_channels_without_batch_norm():
    model = nn.Sequential(Stack(), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    before = traced(model)
    names = [group.name for group in before.analyze("channels").groups]

    assert scored(before, "bn-gamma", group=names.index("0.conv1.weight:0")).isfinite().all()
    assert scored(before, "bn-gamma", group=names.index("1.weight:0")).isnan().all()


def test_bn_gamma_needs_a_batch_norm():
    with pytest.raises(InputError, match=r"bn-gamma needs batch normalizations.*before fold-batchnorm"):
        scored(traced(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 2, 1))), "bn-gamma")


def test_fpgm_is_the_distance_to_all_other_filters():
    model = settled(Stack())
    filters = model.conv1.weight.flatten(1)

    expected = torch.stack([sum(torch.dist(a, b) for b in filters) for a in filters])

    torch.testing.assert_close(scored(traced(model), "fpgm"), expected.detach(), rtol=1e-12, atol=1e-12)


def test_fpgm_finds_the_filter_in_the_middle():
    model = settled(Stack())
    with torch.no_grad():
        model.conv1.weight[3] = model.conv1.weight.mean(0)

    assert scored(fxc.trace(model, IMAGES), "fpgm").argmin() == 3


def test_random_is_the_same_for_a_seed():
    before = traced(Stack())

    assert torch.equal(scored(before, "random", seed=3), scored(before, "random", seed=3))
    assert not torch.equal(scored(before, "random", seed=3), scored(before, "random", seed=4))
