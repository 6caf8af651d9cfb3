"""fold-batchnorm over the space of layers: each takes up the batch norm beside it, or is refused rightly."""

import torch
from folding import CONV, CONV_TRANSPOSE, NORM, check_folds
from fxcompress.passes.fold_batchnorm import FoldBatchnorm
from hypothesis import given, settings
from hypothesis import strategies as st
from models import inputs, run_pass, settled
from torch import nn

from fxcompress import trace
from fxcompress.verification.numerics import compare


@st.composite
def layers(draw):
    """A convolution, transposed convolution or linear layer, its input channels, output channels and an input."""
    bias = draw(st.booleans())
    dims = draw(st.integers(0, 3))
    if dims == 0:
        return nn.Linear(4, 6, bias=bias), 4, 6, inputs(3, 4)
    groups = draw(st.sampled_from([1, 2, 4]))
    channels_in, channels_out = 4, groups * draw(st.integers(1, 2))
    sizes = [draw(st.integers(1, 3)) for _ in range(dims)]
    stride, dilation = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    padding = [draw(st.integers(0, dilation * (size - 1))) for size in sizes]
    transposed = draw(st.booleans())
    kind = CONV_TRANSPOSE[dims] if transposed else CONV[dims]
    extra = {"output_padding": draw(st.integers(0, max(stride, dilation) - 1))} if transposed else {}
    layer = kind(
        channels_in, channels_out, sizes, stride=stride, padding=padding, dilation=dilation, groups=groups, bias=bias,
        **extra,
    )  # fmt: skip
    return layer, channels_in, channels_out, inputs(2, channels_in, *(6,) * dims)


def norm_of(layer, channels):
    return nn.BatchNorm1d(channels) if isinstance(layer, nn.Linear) else NORM[layer.weight.dim() - 2](channels)


class Bank(nn.Module):
    """Models side by side, each with an input of its own: one trace for many cases."""

    def __init__(self, models):
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, *xs):
        return tuple(model(x) for model, x in zip(self.models, xs, strict=True))


many_layers = st.lists(layers(), min_size=6, max_size=6)


@settings(max_examples=4, deadline=None, derandomize=True)
@given(many_layers)
def test_any_layer_takes_up_the_batch_norm_after_it(cases):
    bank = Bank(nn.Sequential(layer, norm_of(layer, out)) for layer, _, out, _ in cases)

    check_folds(bank, tuple(x for *_, x in cases), folded=len(cases))


@settings(max_examples=4, deadline=None, derandomize=True)
@given(many_layers)
def test_any_layer_takes_up_the_batch_norm_before_it_or_refuses_rightly(cases):
    bank = settled(Bank(nn.Sequential(norm_of(layer, into), layer) for layer, into, _, _ in cases))
    before = trace(bank, tuple(x for *_, x in cases))
    uneven = [f"models_{i}_0" for i, (layer, _, _, x) in enumerate(cases) if not maps_ones_to_constants(layer, x)]

    after, result = run_pass(FoldBatchnorm(), before)

    assert result.statistics == {"folded": len(cases) - len(uneven)}
    assert [(refusal.code, refusal.node) for refusal in result.refusals] == [("zero-padding", name) for name in uneven]
    assert compare(before, after).max_rel_error < 1e-12


def maps_ones_to_constants(layer, x):
    """Whether a shift of the input shifts the output alike everywhere: what the pass must find out from attributes."""
    with torch.no_grad():
        places = layer(torch.ones_like(x)).flatten(2) if x.dim() > 2 else torch.zeros(1, 1, 1)
    return bool((places.amax(2) - places.amin(2)).max() < 1e-12)
