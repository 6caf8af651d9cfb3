"""What select-channels takes for options that are left open, by what the task has."""

import pytest
import torch
from models import inputs, settled
from torch import nn

import fxcompress as fxc

IMAGES = inputs(4, 3, 6, 6)
CALIBRATION = fxc.Task(calibration=[IMAGES])
TRAINING = fxc.Task(training=[IMAGES])


@pytest.fixture
def before():
    """Two groups of 8 channels, of which 6 of the first give nothing."""
    model = settled(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1)))
    with torch.no_grad():
        model[0].weight[:6] = 0
        model[0].bias[:6] = 0
        model[2].weight[:, :6] = 0
    return fxc.trace(model, IMAGES)


def same(before, task, options, explicit):
    found, expected = (fxc.analyze(before, f"select-channels{{{text}}}", task) for text in (options, explicit))
    return found.removals == expected.removals


@pytest.mark.parametrize(("task", "criterion"), [(None, "l2"), (CALIBRATION, "output"), (TRAINING, "output")])
def test_batches_are_looked_at_where_there_are_any(before, task, criterion):
    (first, *_) = fxc.analyze(before, "select-channels{ratio=0.5}", task).removals

    assert first.reason.startswith(f"{criterion}, ")


def test_a_ratio_is_that_of_each_group(before):
    assert same(before, CALIBRATION, "ratio=0.5", "ratio=0.5 criterion=output scope=uniform")
    assert not same(before, CALIBRATION, "ratio=0.5", "ratio=0.5 criterion=output scope=global")


def test_groups_compete_for_macs_by_what_compares_between_them(before):
    assert same(before, CALIBRATION, "macs=0.6", "macs=0.6 criterion=output scope=global")
    assert not same(before, CALIBRATION, "macs=0.6", "macs=0.6 criterion=output scope=uniform")


def test_norms_of_weights_do_not_compare_between_groups(before):
    assert same(before, None, "macs=0.6", "macs=0.6 criterion=l2 scope=uniform")
    assert not same(before, None, "macs=0.6", "macs=0.6 criterion=l2 scope=global")
