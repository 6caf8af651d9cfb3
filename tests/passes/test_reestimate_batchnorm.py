"""reestimate-batchnorm: running statistics become those of the calibration batches."""

import pytest
import torch
from fxcompress.passes.reestimate_batchnorm import ReestimateBatchnorm
from models import inputs, settled
from torch import nn
from torch.nn import functional as F

from fxcompress import InputError, PassManager, Task, trace


def reestimated(model, *batches, **options):
    before = trace(model, batches[0])
    done = PassManager([ReestimateBatchnorm(**options)]).run(before, Task(calibration=list(batches)))
    return done.program, done.records[0].result


NORMS = [
    (nn.BatchNorm1d, (9, 4)),
    (nn.BatchNorm1d, (5, 4, 3)),
    (nn.BatchNorm2d, (5, 4, 3, 2)),
    (nn.BatchNorm3d, (5, 4, 3, 2, 2)),
]


@pytest.mark.parametrize(("norm", "shape"), NORMS, ids=str)
def test_statistics_are_those_of_all_rows_together(norm, shape):
    batches = [inputs(*shape, seed=seed) * seed + seed for seed in (1, 2, 3)]

    after, result = reestimated(settled(nn.Sequential(norm(4), nn.ReLU())), *batches)

    rows = torch.cat(batches).transpose(0, 1).flatten(1)
    new = after.graph_module.get_submodule("0")
    torch.testing.assert_close(new.running_mean, rows.mean(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(new.running_var, rows.var(1), rtol=1e-12, atol=1e-12)
    assert result.statistics == {"reestimated": 1}


def test_agrees_with_training_on_one_batch_with_a_cumulative_average():
    model = settled(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    )
    x = inputs(6, 3, 8, 8)
    after, _ = reestimated(model, x)

    for norm in (model[1], model[4]):
        norm.reset_running_stats()
        norm.momentum = None
    model.train()(x)

    for index in (1, 4):
        new = after.graph_module.get_submodule(str(index))
        torch.testing.assert_close(new.running_mean, model[index].running_mean, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(new.running_var, model[index].running_var, rtol=1e-10, atol=1e-10)


class Functional(nn.Module):
    """A batch norm by function, called twice with the same statistics and a weight that is computed."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(4))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("variance", torch.ones(4))

    def forward(self, x):
        x = F.batch_norm(x, self.mean, self.variance, self.w.exp())
        return F.batch_norm(2 * x, self.mean, self.variance)


def test_calls_that_share_statistics_share_what_both_see():
    x = inputs(50, 4)
    after, result = reestimated(settled(Functional()), x)

    gain = settled(Functional()).w.exp()
    first = 2 * F.batch_norm(x, None, None, gain, training=True)
    rows = torch.cat([x, first.detach()])
    torch.testing.assert_close(after.graph_module.mean, rows.mean(0), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(after.graph_module.variance, rows.var(0), rtol=1e-10, atol=1e-10)
    assert result.statistics == {"reestimated": 2}


def test_reads_no_more_batches_than_it_is_told():
    batches = [inputs(9, 4, seed=seed) for seed in (1, 2)]

    after, _ = reestimated(settled(nn.Sequential(nn.BatchNorm1d(4))), *batches, batches=1)

    torch.testing.assert_close(after.graph_module.get_submodule("0").running_mean, batches[0].mean(0))


def test_changes_nothing_without_running_statistics():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False)).double()

    after = PassManager([ReestimateBatchnorm()]).run(trace(model.eval(), inputs(5, 3)))

    assert not after.records[0].changed


def test_the_model_keeps_its_statistics():
    model = settled(nn.Sequential(nn.BatchNorm1d(4)))
    mean = model[0].running_mean.clone()

    reestimated(model, inputs(9, 4))

    assert torch.equal(model[0].running_mean, mean)


def test_needs_calibration_batches():
    with pytest.raises(InputError, match="reestimate-batchnorm needs calibration batches"):
        PassManager("reestimate-batchnorm").run(trace(settled(nn.BatchNorm1d(4)), inputs(9, 4)))


def test_needs_more_than_one_value_per_channel():
    with pytest.raises(InputError, match="give larger batches"):
        reestimated(settled(nn.Sequential(nn.BatchNorm1d(4))), inputs(1, 4))
