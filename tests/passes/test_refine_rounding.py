"""refine-rounding: which way each weight is rounded is chosen by what the layer gives."""

import pytest
import torch
from fxcompress.passes.refine_rounding import RefineRounding
from torch import nn

from fxcompress import InputError, PassManager, Task, load, trace
from fxcompress.artifact import save


def images(count=64, seed=1):
    """Images whose channels and neighbours go together."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 2, 3, 3, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=(8, 8), mode="bilinear")
    return torch.cat([smooth, smooth.sum(1, keepdim=True)], 1)


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 2, bias=False), nn.ReLU(),
        nn.Flatten(), nn.Linear(150, 5),
    )  # fmt: skip
    return model.eval()


def quantized(x, model=None):
    model = model or network()
    task = Task(calibration=list(x.split(16)))
    return PassManager("insert-qdq{vnni=true},correct-bias").run(trace(model, x), task).program


def refined(program, x, **options):
    done = PassManager([RefineRounding(**options)]).run(program, Task(calibration=list(x.split(16))))
    return done.program, done.records[0].result


def squared_error(program, x):
    with torch.no_grad():
        return float((program(x) - network()(x)).square().mean())


@pytest.fixture(scope="module")
def before():
    return quantized(images())


@pytest.fixture(scope="module")
def after(before):
    return refined(before, images())


def test_layers_err_less_on_data_that_were_not_looked_at(before, after):
    program, result = after
    assert result.changed
    assert result.statistics["refined"] == 4
    assert result.statistics["% of error left"] < 60
    fresh = images(256, seed=2)
    assert squared_error(program, fresh) < squared_error(before, fresh)


def test_only_weights_and_biases_change_and_weights_by_less_than_a_step(before, after):
    state, changed = after[0].graph_module.state_dict(), set()
    for name, tensor in before.graph_module.state_dict().items():
        if not torch.equal(tensor, state[name]):
            changed.add(name.rpartition(".")[2])
        if name.endswith(".weight"):
            step = state[f"{name}_scale"].max()
            assert float((tensor - state[name]).abs().max()) <= 0.56 * step
    assert changed == {"weight", "bias", "weight_bias"}


def test_the_mean_of_what_the_model_gives_stays(before, after):
    x = images()
    with torch.no_grad():
        assert float((before(x) - after[0](x)).mean(0).abs().max()) < 1e-6


def test_weights_stay_trainable(after):
    assert all(parameter.requires_grad for parameter in after[0].emit().parameters())


def test_twice_is_once(after):
    _, result = refined(after[0], images())
    assert after[1].statistics["refined"] == 4
    assert not result.changed


def test_a_saved_model_is_not_refined_again(after, tmp_path):
    save(after[0], tmp_path / "m.pt2")
    _, result = refined(load(tmp_path / "m.pt2"), images())
    assert not result.changed


def test_noise_that_says_nothing_changes_nothing():
    """Inputs that have nothing in common give the nearest grid points, or so nearly that no half confirms another."""
    x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1)).eval()
    _, result = refined(quantized(x, model), x)
    assert result.statistics["refined"] == 0 or result.statistics["% of error left"] > 90


def test_a_shared_layer_is_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared = nn.Linear(6, 6)

        def forward(self, x):
            return self.shared(torch.relu(self.shared(x)))

    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    _, result = refined(quantized(x, Twice().eval()), x)
    assert not result.changed
    assert {refusal.code for refusal in result.refusals} == {"shared-weight"}


def test_a_model_that_is_not_quantized_needs_no_batches():
    done = PassManager("refine-rounding").run(trace(network(), images()))
    assert not done.records[0].changed


def test_a_quantized_model_needs_batches(before):
    with pytest.raises(InputError, match="refine-rounding needs calibration batches"):
        PassManager("refine-rounding").run(before)


@pytest.mark.parametrize(("option", "least"), [("batches", 1), ("places", 2), ("sweeps", 0)])
def test_options_have_a_least_value(option, least):
    with pytest.raises(InputError, match=f"{option} must be at least {least}"):
        RefineRounding(**{option: least - 1})
