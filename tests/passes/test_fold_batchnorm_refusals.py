"""fold-batchnorm: what is refused and why, and that wrong folds are caught."""

import pytest
import torch
from folding import check_refuses
from fxcompress.passes import fold_batchnorm
from fxcompress.passes.fold_batchnorm import FoldBatchnorm
from models import inputs, run_pass, settled
from torch import nn
from torch.nn import functional as F

from fxcompress import trace
from fxcompress.errors import VerificationError

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
