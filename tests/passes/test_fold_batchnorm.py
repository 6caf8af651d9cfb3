"""fold-batchnorm: what folds exactly, what is refused and why, and that wrong folds are caught."""

import pytest
import torch
from fxcompress.passes import fold_batchnorm
from fxcompress.passes.fold_batchnorm import FoldBatchnorm
from hypothesis import given, settings
from hypothesis import strategies as st
from models import inputs, layer_kinds, run_pass, settled
from torch import nn
from torch.nn import functional as F

from fxcompress import trace
from fxcompress.errors import VerificationError
from fxcompress.verification.numerics import compare

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
CONV_TRANSPOSE = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def check_folds(model, x, folded=1):
    """Folds every batch norm of a settled model, exactly; gives the Program after."""
    before = trace(settled(model), x)
    after, result = run_pass(FoldBatchnorm(), before)
    assert result.changed
    assert result.refusals == ()
    assert result.statistics == {"folded": folded}
    assert not any("BatchNorm" in kind for kind in layer_kinds(after))
    assert not any("running" in name for name in after.graph_module.state_dict())
    assert compare(before, after).max_rel_error < 1e-12
    return after


def check_refuses(model, x, code, node):
    """The pass leaves the Program alone, and says why."""
    before = trace(settled(model), x)
    after, result = run_pass(FoldBatchnorm(), before)
    assert not result.changed
    assert result.statistics == {"folded": 0}
    assert [(refusal.code, refusal.node) for refusal in result.refusals] == [(code, node)]
    assert after.text() == before.text()
    return result.refusals[0]


# --- after a layer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("kinds", [CONV, CONV_TRANSPOSE], ids=["conv", "transposed"])
def test_folds_into_the_convolution_before(kinds, dims, bias):
    conv = kinds[dims](4, 6, 3, stride=2, padding=1, groups=2, bias=bias)

    after = check_folds(nn.Sequential(conv, NORM[dims](6)), inputs(2, 4, *(5,) * dims))

    assert sorted(after.graph_module.state_dict()) == ["0.bias", "0.weight"]


def test_folds_into_the_linear_layer_before(golden):
    after = check_folds(nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU()), inputs(3, 4))

    golden("fold-batchnorm-after-linear", after.text())


@pytest.mark.parametrize("options", [{"affine": False}, {"eps": 0.1}, {"momentum": None}])
def test_folds_whatever_the_options_of_the_batch_norm(options):
    check_folds(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, **options)), inputs(2, 3, 5, 5))


def test_folds_a_residual_network(golden):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
            self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
            self.shortcut = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))

        def forward(self, x):
            y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
            return (y + self.shortcut(x)).relu()

    after = check_folds(Block(), inputs(2, 3, 6, 6), folded=3)

    golden("fold-batchnorm-residual", after.text())


class Functional(nn.Module):
    """Calls a convolution and a batch norm by function, with state that belongs to no standard module."""

    def __init__(self, bias):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.b = nn.Parameter(torch.randn(4)) if bias else None
        self.gain = nn.Parameter(torch.ones(4))
        self.offset = nn.Parameter(torch.zeros(4))
        self.register_buffer("mean", torch.linspace(-1, 1, 4))
        self.register_buffer("variance", torch.linspace(0.5, 2, 4))

    def forward(self, x):
        return F.batch_norm(F.conv2d(x, self.w, self.b), self.mean, self.variance, self.gain, self.offset)


@pytest.mark.parametrize("bias", [True, False])
def test_folds_calls_that_are_no_modules(bias, golden):
    before = trace(settled(Functional(bias)), inputs(2, 3, 5, 5))
    assert layer_kinds(before) == []

    after, result = run_pass(FoldBatchnorm(), before)

    assert result.statistics == {"folded": 1}
    assert sorted(after.graph_module.state_dict()) == (["b", "w"] if bias else ["w", "w_bias"])
    assert compare(before, after).max_rel_error < 1e-12
    golden(f"fold-batchnorm-functional-{'bias' if bias else 'no-bias'}", after.text())


# --- before a layer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_folds_into_an_unpadded_convolution_after(dims, bias):
    conv = CONV[dims](4, 6, 3, stride=2, dilation=2, groups=2, bias=bias)

    after = check_folds(nn.Sequential(NORM[dims](4), conv), inputs(2, 4, *(7,) * dims))

    assert sorted(after.graph_module.state_dict()) == ["1.bias", "1.weight"]


def test_folds_into_the_linear_layer_after():
    check_folds(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 6, bias=False)), inputs(3, 4))


@pytest.mark.parametrize("padding", ["valid", "same"])
def test_padding_by_name_is_understood(padding):
    kernel = 3 if padding == "valid" else 1

    check_folds(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, kernel, padding=padding)), inputs(2, 3, 5, 5))


@pytest.mark.parametrize(("kernel", "padding"), [(1, 0), (3, 2), (2, 1)])
def test_folds_into_a_transposed_convolution_whose_outputs_see_every_tap(kernel, padding):
    conv = nn.ConvTranspose2d(4, 6, kernel, padding=padding, groups=2)

    check_folds(nn.Sequential(nn.BatchNorm2d(4), conv), inputs(2, 4, 6, 6))


def test_folds_into_every_layer_after():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)
            self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 3, bias=False)

        def forward(self, x):
            x = self.norm(x)
            return self.left(x) * self.right(x)

    check_folds(Branches(), inputs(3, 4))


def test_zero_shift_folds_into_a_padded_convolution():
    model = settled(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)))
    with torch.no_grad():
        model[0].running_mean.zero_()
        model[0].bias.zero_()
    before = trace(model, inputs(2, 3, 5, 5))

    after, result = run_pass(FoldBatchnorm(), before)

    assert result.statistics == {"folded": 1}
    assert compare(before, after).max_rel_error < 1e-12


def test_folds_on_both_sides_of_one_layer():
    check_folds(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 5), nn.BatchNorm1d(5)), inputs(3, 4), folded=2)


# --- sharing ---------------------------------------------------------------------------------------------------------


def test_a_batch_norm_called_twice_folds_at_each_call():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2, self.norm = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(self.conv2(self.norm(self.conv1(x)).relu()))

    check_folds(Shared(), inputs(2, 3, 7, 7), folded=2)


def test_a_batch_norm_that_is_refused_at_one_call_stays_there():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(self.conv(x)) + self.norm(x).relu()[:, :, 2:, 2:]

    before = trace(settled(Half()), inputs(2, 3, 7, 7))

    after, result = run_pass(FoldBatchnorm(), before)

    assert result.statistics == {"folded": 1}
    assert layer_kinds(after) == ["Conv2d", "BatchNorm2d"]
    assert compare(before, after).max_rel_error < 1e-12


class CalledTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.conv(self.conv(x).relu()))


class TiedWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.other = nn.Conv2d(3, 3, 1)
        self.other.weight = self.conv.weight

    def forward(self, x):
        return self.norm(self.conv(x)) + self.other(x)


class WeightReadElsewhere(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.conv(x)) * self.conv.weight.sum()


@pytest.mark.parametrize("model", [CalledTwice, TiedWeight, WeightReadElsewhere])
def test_refuses_a_weight_that_another_call_reads(model):
    check_refuses(model(), inputs(2, 3, 5, 5), "shared-weight", "norm")


def test_names_of_one_layer_stay_tied():
    class TwoNames(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
            self.first = self.body[0]

        def forward(self, x):
            return self.body(x)

    after = check_folds(TwoNames(), inputs(2, 3, 5, 5))

    root = after.graph_module
    assert root.get_parameter("first.weight") is root.get_parameter("body.0.weight")


# --- refusals --------------------------------------------------------------------------------------------------------


def test_refuses_another_reader_of_the_layer():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            x = self.conv(x)
            return self.norm(x) + x.sigmoid()

    refusal = check_refuses(Reader(), inputs(2, 3, 5, 5), "extra-users", "norm")

    assert "sigmoid" in refusal.reason


def test_refuses_another_reader_of_the_batch_norm():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            x = self.norm(x)
            return self.conv(x) + x

    check_refuses(Reader(), inputs(2, 3, 5, 5), "extra-users", "norm")


def test_refuses_statistics_of_the_batch():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))

    check_refuses(model, inputs(2, 3, 5, 5), "batch-statistics", "_1")


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Conv2d(3, 4, 3, padding="same"),
        nn.ConvTranspose2d(3, 4, 3),
        nn.ConvTranspose2d(3, 4, 3, padding=1),
        nn.ConvTranspose2d(3, 4, 2, stride=2),
        nn.ConvTranspose2d(3, 4, 3, padding=4, dilation=2, output_padding=1),
    ],
    ids=["padding", "same", "border", "little padding", "stride", "output padding"],
)
def test_refuses_a_shift_that_the_border_does_not_see(conv):
    check_refuses(nn.Sequential(nn.BatchNorm2d(3), conv), inputs(2, 3, 9, 9), "zero-padding", "_0")


def test_refuses_a_batch_norm_over_another_dim_than_the_features():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(5))

    check_refuses(model, inputs(2, 5, 4), "channel-dim", "_1")


def test_refuses_to_fold_into_a_linear_layer_over_another_dim():
    model = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 6))

    check_refuses(model, inputs(2, 5, 5), "channel-dim", "_0")


def test_refuses_a_computed_weight():
    class Standardized(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(F.conv2d(x, self.conv.weight - self.conv.weight.mean(), self.conv.bias))

    check_refuses(Standardized(), inputs(2, 3, 5, 5), "computed-weight", "norm")


def test_refuses_weights_that_overflow():
    model = settled(nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))).float()
    with torch.no_grad():
        model[0].weight.fill_(1e20)
        model[1].weight.fill_(1e30)

    _, result = run_pass(FoldBatchnorm(), trace(model, torch.zeros(2, 3, 5, 5)))

    assert not result.changed
    assert [refusal.code for refusal in result.refusals] == ["not-finite"]


def test_says_nothing_of_a_batch_norm_with_no_layer_beside_it():
    _, result = run_pass(FoldBatchnorm(), trace(settled(nn.Sequential(nn.BatchNorm1d(4), nn.ReLU())), inputs(3, 4)))

    assert not result.changed
    assert result.refusals == ()


# --- what stays ------------------------------------------------------------------------------------------------------


def test_a_second_run_changes_nothing():
    once = check_folds(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), inputs(2, 3, 5, 5))

    twice, result = run_pass(FoldBatchnorm(), once)

    assert not result.changed
    assert twice.text() == once.text()


def test_keeps_dtype_memory_format_and_what_is_trained():
    conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    conv.weight.requires_grad_(False)
    after = check_folds(nn.Sequential(conv, nn.BatchNorm2d(4)), inputs(2, 3, 5, 5))

    new = after.graph_module.get_submodule("0")
    assert isinstance(new.weight, nn.Parameter)
    assert (new.weight.requires_grad, new.bias.requires_grad) == (False, True)
    assert new.weight.is_contiguous(memory_format=torch.channels_last)
    assert (new.weight.dtype, new.bias.dtype) == (torch.float64, torch.float64)


def test_the_model_and_the_program_before_keep_their_weights():
    model = settled(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = trace(model, inputs(2, 3, 5, 5))
    text = before.text()

    run_pass(FoldBatchnorm(), before)

    assert model[0].bias is None
    assert before.text() == text
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=0)


def test_single_precision_folds_in_double():
    model = settled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).float()
    wide = settled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    wide.load_state_dict(model.state_dict())

    after, _ = run_pass(FoldBatchnorm(), trace(model, inputs(2, 3, 5, 5).float()))
    exact, _ = run_pass(FoldBatchnorm(), trace(wide, inputs(2, 3, 5, 5)))

    for name, tensor in after.graph_module.state_dict().items():
        assert torch.equal(tensor, exact.graph_module.state_dict()[name].float()), name


def test_folds_on_the_meta_device():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)).to("meta")
    before = trace(model, torch.empty(2, 3, 5, 5, device="meta"))

    after, result = run_pass(FoldBatchnorm(), before)

    assert result.statistics == {"folded": 1}
    assert after.graph_module.get_parameter("0.bias").is_meta


# --- over the space of layers ----------------------------------------------------------------------------------------


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


# --- planted bugs ----------------------------------------------------------------------------------------------------

right = fold_batchnorm.scale_and_shift


def forgotten_eps(norm):
    scale, _ = right(norm)
    factor = torch.sqrt(norm["running_var"] + norm["eps"]) / torch.sqrt(norm["running_var"])
    return scale * factor, norm["bias"] - norm["running_mean"] * scale * factor


def forgotten_mean(norm):
    return right(norm)[0], norm["bias"].detach()


def wrong_channel(norm):
    scale, shift = right(norm)
    return scale.roll(1), shift


@pytest.mark.parametrize("bug", [forgotten_eps, forgotten_mean, wrong_channel])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_wrong_fold_is_caught(monkeypatch, bug, dtype):
    program = trace(
        settled(nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU())).to(dtype),
        inputs(2, 3, 6, 6).to(dtype),
    )
    run_pass(FoldBatchnorm(), program)
    monkeypatch.setattr(fold_batchnorm, "scale_and_shift", bug)

    with pytest.raises(VerificationError, match="must be exact"):
        run_pass(FoldBatchnorm(), program)


def test_scaling_the_wrong_axis_is_caught(monkeypatch):
    program = trace(settled(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))), inputs(3, 4))
    layout = type(fold_batchnorm.weighted_layers(program.graph_module, program.nodes)[0].layout)
    monkeypatch.setattr(layout, "per_output", layout.per_input)

    with pytest.raises(VerificationError, match="must be exact"):
        run_pass(FoldBatchnorm(), program)
