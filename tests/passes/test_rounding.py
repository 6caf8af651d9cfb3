"""The search for a rounding: never worse than the nearest points, and near to what trying everything finds."""

import itertools

import pytest
import torch
from fxcompress.passes.calibrated.rounding import WeightGrid, error, refined, regular


def problem(groups=2, inputs=5, outputs=3, seed=0):
    """Filters, the second moments of inputs that go together, and a grid."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(groups, inputs, outputs, generator=generator, dtype=torch.float64)
    x = torch.randn(groups, 64, 2, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(groups, 2, inputs, generator=generator, dtype=torch.float64)
    x = x + 0.1 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    scale = weight.abs().amax(1, keepdim=True) / 7
    return weight, regular(x.mT @ x, 0.01), WeightGrid(scale, -7, 7)


def best_of_all(weight, second, grid):
    low, high = grid.around(weight)
    tried = []
    for ups in itertools.product([False, True], repeat=weight.shape[1]):
        up = torch.tensor(ups)[None, :, None]
        tried.append(error(torch.where(up, high, low) - weight, second))
    return torch.stack(tried).amin(0)


def test_near_to_the_best_of_all_roundings():
    weight, second, grid = problem(groups=50)
    found = error(refined(weight, second, grid, sweeps=4) - weight, second)
    nearest = error(grid.nearest(weight) - weight, second)
    best = best_of_all(weight, second, grid)
    assert bool((found <= nearest + 1e-12).all())
    assert bool((found >= best - 1e-12).all())
    assert float((found / best).log().mean()) < 0.4 * float((nearest / best).log().mean())


def test_each_weight_goes_to_a_grid_point_beside_it():
    weight, second, grid = problem(inputs=200)
    steps = refined(weight, second, grid, sweeps=2) / grid.scale
    assert bool((steps - steps.round()).abs().max() < 1e-9)
    assert bool(((steps - weight / grid.scale).abs() < 1 + 1e-9).all())
    assert bool((steps.abs() <= 7 + 1e-9).all())


@pytest.mark.parametrize("inputs", [5, 300])
def test_more_sweeps_never_err_more(inputs):
    weight, second, grid = problem(inputs=inputs)
    errors = [float(error(refined(weight, second, grid, sweeps) - weight, second).sum()) for sweeps in (0, 1, 4)]
    assert errors == sorted(errors, reverse=True)


def test_a_large_penalty_gives_the_nearest_points():
    weight, second, grid = problem()
    assert torch.equal(refined(weight, regular(second, 1e9), grid, sweeps=2), grid.nearest(weight))


def test_weights_are_rounded_to_what_was_chosen_and_move_only_where_they_must():
    weight, second, grid = problem(inputs=50)
    chosen, nearest = refined(weight, second, grid, sweeps=2), grid.nearest(weight)
    moved = grid.rounding_to(chosen, weight)
    same = (chosen - nearest).abs() < 1e-9
    assert torch.allclose(grid.nearest(moved), chosen, atol=1e-9)
    assert torch.equal(moved[same], weight[same])
    assert 0 < int(same.sum()) < same.numel()
    assert bool(((moved - weight).abs() <= 0.55 * grid.scale + 1e-9).all())


def test_an_input_that_is_never_there():
    weight, second, grid = problem()
    second = regular(second * torch.tensor([1.0, 0, 1, 1, 1])[:, None] * torch.tensor([1.0, 0, 1, 1, 1]), 0.0)
    assert bool(torch.isfinite(refined(weight, second, grid, sweeps=2)).all())
