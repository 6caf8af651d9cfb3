"""fold-batchnorm: what folds exactly, and what stays as it is."""

import pytest
import torch
from folding import CONV, CONV_TRANSPOSE, NORM, check_folds, check_refuses
from fxcompress.passes.fold_batchnorm import FoldBatchnorm
from models import inputs, layer_kinds, run_pass, settled
from torch import nn
from torch.nn import functional as F

from fxcompress import trace
from fxcompress.verification.numerics import compare

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
