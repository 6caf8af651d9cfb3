"""What compensate solves: weights from moments, as far as the data agree, and what the filters of a layer see."""

import pytest
import torch
from fxcompress.passes.calibrated.least_squares import PENALTIES, Moments, fit, solve
from fxcompress.passes.calibrated.patches import sample
from models import inputs
from torch import nn

from fxcompress import trace
from fxcompress.ir.ops import operations
from fxcompress.ir.weighted import weighted_layer

# --- the data decide how far -----------------------------------------------------------------------------------------


def test_cross_validation_keeps_the_weights_where_the_halves_disagree():
    weight, x = torch.zeros(1, 6, 3, dtype=torch.float64), inputs(50, 1, 6)
    y = x[:, 0] @ inputs(6, 3, seed=2)
    halves = [Moments.zero(weight).add(x, sign * y[:, None]) for sign in (1, -1)]

    found = fit((halves[0], halves[1]), weight, shifted=True, penalty=None)

    assert torch.equal(found.weight, weight)


def test_cross_validation_goes_as_far_as_the_data_agree():
    weight = inputs(1, 6, 3)
    halves = [
        Moments.zero(weight).add(x, (x.mT.transpose(1, 2) @ weight)) for x in (inputs(50, 1, 6, seed=s) for s in (3, 4))
    ]

    found = fit((halves[0], halves[1]), torch.zeros_like(weight), shifted=False, penalty=None)

    torch.testing.assert_close(found.weight, weight, rtol=3 * PENALTIES[-1], atol=3 * PENALTIES[-1])


@pytest.mark.parametrize("penalty", [0.5, 0.01])
def test_the_penalty_pulls_towards_the_old_weights(penalty):
    x, y, weight = inputs(30, 1, 6), inputs(30, 1, 3, seed=2), inputs(1, 6, 3, seed=3)
    moments = Moments.zero(weight).add(x, y)
    strength = (penalty * x.square().sum((0, 1)).mean()).sqrt()
    rows = torch.cat([x[:, 0], strength * torch.eye(6, dtype=torch.float64)])
    wanted = torch.cat([y[:, 0], strength * weight[0]])

    expected = torch.linalg.lstsq(rows, wanted).solution

    torch.testing.assert_close(solve(moments, weight, penalty)[0], expected, rtol=1e-9, atol=1e-9)


def test_centred_moments_are_those_of_deviations():
    x, y, weight = inputs(30, 2, 6) + 3, inputs(30, 2, 4, seed=2) - 1, inputs(2, 6, 4)
    zero = Moments.zero(weight)

    found, expected = zero.add(x, y).centred(), zero.add(x - x.mean(0), y - y.mean(0))

    for name in ("xx", "xy", "yy"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-10, atol=1e-10)
    assert found.error(weight) == pytest.approx(
        float((y - y.mean(0) - torch.einsum("ngi,gio->ngo", x - x.mean(0), weight)).square().sum())
    )


# --- what the filters see --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 4), (3, 5, 6)),
        (nn.Conv1d(6, 4, 3, stride=2, padding=1), (3, 6, 9)),
        (nn.Conv2d(6, 4, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2), groups=2), (3, 6, 9, 7)),
        (nn.Conv2d(6, 6, 4, padding="same", groups=6), (3, 6, 8, 8)),
        (nn.Conv2d(6, 4, 3, padding="valid"), (6, 8, 8)),
        (nn.Conv3d(6, 4, 2), (2, 6, 4, 4, 4)),
        (nn.ConvTranspose1d(6, 4, 3, stride=3, output_padding=1), (3, 6, 5)),
        (nn.ConvTranspose2d(6, 4, (3, 2), stride=(2, 1), padding=(2, 0), dilation=(1, 3), groups=2), (3, 6, 6, 5)),
        (nn.ConvTranspose3d(6, 4, 2, stride=2), (2, 6, 3, 3, 3)),
    ],
    ids=str,
)  # fmt: skip
def test_filters_times_what_they_see_are_the_outputs(layer, shape):
    layer.double()
    x = inputs(*shape)
    program = trace(nn.Sequential(layer), x, batch_dim=None)
    call = weighted_layer(next(operations(program.graph_module)))
    with torch.no_grad():
        y = layer(x)
        found = sample(call, x, y, {}, y.numel(), torch.Generator())

        parts = (
            call.layout.split(call.operation["weight"]).flatten(3)
            if layer.weight.dim() > 2
            else layer.weight[None, ..., None]
        )
        computed = torch.einsum("ngik,goik->ngo", found.inputs, parts) + layer.bias.reshape(parts.shape[:2])
    torch.testing.assert_close(computed, found.outputs)
    assert found.outputs.numel() == y.numel()


def test_places_are_drawn_once_and_never_where_something_is_removed():
    layer = weighted_layer(next(operations(trace(nn.Sequential(nn.Linear(2, 2)), torch.randn(4, 6, 2)).graph_module)))
    y = torch.arange(24.0).reshape(4, 6, 1).expand(4, 6, 2)
    keep = torch.tensor([True, False, True, True, False, True])

    some = sample(layer, torch.randn(4, 6, 2), y, {1: keep}, 10, torch.Generator().manual_seed(0))
    every = sample(layer, torch.randn(4, 6, 2), y, {1: keep}, 100, torch.Generator().manual_seed(0))

    assert len(set(some.outputs[:, 0, 0].tolist())) == 10
    assert every.outputs[:, 0, 0].tolist() == y[:, keep, 0].flatten().tolist()
    assert every.position.tolist() == sorted(every.position.tolist())
    assert every.position.max() < 1
