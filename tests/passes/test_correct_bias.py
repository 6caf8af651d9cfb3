"""correct-bias: the mean of the quantization error goes into the bias."""

import pytest
import torch
from models import inputs
from torch import nn

from fxcompress import InputError, PassManager, Task, load, trace
from fxcompress.artifact import save


def images(count=32, seed=1):
    return inputs(count, 3, 8, 8, seed=seed).float()


def network(bias=True):
    """Layers behind ReLUs, so that rounding errors of filters add up to a constant."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=bias), nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8, bias=bias), nn.ReLU(),
        nn.Conv2d(8, 6, 1, bias=bias), nn.ReLU(),
        nn.Flatten(), nn.Linear(96, 5, bias=bias),
    )  # fmt: skip
    return model.eval()


def quantized(model, x, task):
    return PassManager("insert-qdq{vnni=true}").run(trace(model, x), task).program


def corrected(program, task, **options):
    given = "".join(f"{{{name}={value}}}" for name, value in options.items())
    done = PassManager(f"correct-bias{given}").run(program, task)
    return done.program, done.records[0].result


def squared_error(program, model, x):
    with torch.no_grad():
        return float((program(x) - model(x)).square().mean())


def test_the_mean_error_on_calibration_batches_is_gone():
    model, x = network(), images()
    task = Task(calibration=list(x.split(8)))
    before = quantized(model, x, task)

    after, result = corrected(before, task)

    assert result.changed
    assert result.statistics == {"corrected": 4}
    with torch.no_grad():
        reference = model(x)
        off = (after(x) - reference).mean(0).abs().max()
        was = (before(x) - reference).mean(0).abs().max()
    assert was > 1e-4
    assert off < 1e-6


def test_other_data_gain_too():
    model, x = network(), images()
    task = Task(calibration=[x])
    before = quantized(model, x, task)

    after, _ = corrected(before, task)

    fresh = images(256, seed=2)
    assert squared_error(after, model, fresh) < squared_error(before, model, fresh)


def test_a_layer_without_bias_gets_one():
    model, x = network(bias=False), images()
    task = Task(calibration=[x])
    before = quantized(model, x, task)

    after, result = corrected(before, task)

    assert result.statistics == {"corrected": 4}
    assert len(list(after.graph_module.parameters())) == len(list(before.graph_module.parameters())) + 4
    with torch.no_grad():
        assert (after(x) - model(x)).mean(0).abs().max() < 1e-6


def test_weights_and_grids_stay():
    x = images()
    task = Task(calibration=[x])
    before = quantized(network(), x, task)

    after, _ = corrected(before, task)

    state = after.graph_module.state_dict()
    for name, tensor in before.graph_module.state_dict().items():
        assert torch.equal(tensor, state[name]) != name.endswith("bias")


def test_twice_is_once():
    """What is corrected would be taken for what the layer gave in floating point."""
    x = images()
    task = Task(calibration=[x])
    once, _ = corrected(quantized(network(), x, task), task)

    twice, result = corrected(once, task)

    assert not result.changed
    assert torch.equal(once(x), twice(x))


def test_a_saved_model_is_not_corrected_again(tmp_path):
    x = images()
    task = Task(calibration=[x])
    once, _ = corrected(quantized(network(), x, task), task)
    save(once, tmp_path / "m.pt2")

    twice, result = corrected(load(tmp_path / "m.pt2"), task)

    assert not result.changed
    assert torch.equal(once(x), twice(x))


def test_a_shared_layer_is_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.shared = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.shared(torch.relu(self.shared(torch.relu(self.first(x)))))

    x = inputs(16, 6).float()
    task = Task(calibration=[x])
    before = quantized(Twice().eval(), x, task)

    _, result = corrected(before, task)

    assert result.statistics == {"corrected": 1}
    assert {refusal.code for refusal in result.refusals} == {"shared-weight"}
    assert len(result.refusals) == 2


def test_a_model_that_is_not_quantized_needs_no_batches():
    _, result = corrected(trace(network(), images()), None)

    assert not result.changed
    assert result.statistics == {"corrected": 0}


def test_a_quantized_model_needs_batches():
    x = images()
    program = quantized(network(), x, Task(calibration=[x]))

    with pytest.raises(InputError, match="correct-bias needs calibration batches"):
        corrected(program, None)


def test_at_least_one_batch():
    with pytest.raises(InputError, match="batches must be at least 1"):
        PassManager("correct-bias{batches=0}")
