import sys

import pytest
import torch
from torch import nn

from fxcompress.digits import Epoch, load_digits, top1, train
from fxcompress.errors import InputError, MissingExtraError


@pytest.fixture(scope="module")
def data():
    return load_digits()


@pytest.fixture(scope="module")
def training(data):
    epochs: list[Epoch] = []
    return train(data, epochs=3, on_epoch=epochs.append), epochs


def test_three_parts_hold_every_image_once(data):
    parts = [part.tensors[0] for part in (data.train, data.validation, data.test)]
    assert [tuple(part.shape) for part in parts] == [(1197, 1, 8, 8), (200, 1, 8, 8), (400, 1, 8, 8)]
    assert (min(part.min() for part in parts), max(part.max() for part in parts)) == (0, 1)
    everything = torch.cat(parts).flatten(1)
    # 1797 images, of which scikit-learn's set has no two alike: a part that overlapped another would show.
    assert len(everything.unique(dim=0)) == 1797


def test_every_part_has_all_classes_in_like_shares(data):
    for part in (data.train, data.validation, data.test):
        shares = part.tensors[1].bincount(minlength=10) / len(part)
        assert shares.min() > 0.09
        assert shares.max() < 0.11


def test_three_epochs_learn_most_of_it(data, training):
    model, epochs = training
    assert top1(model, data.test) > 70
    assert [(epoch.number, epoch.total) for epoch in epochs] == [(1, 3), (2, 3), (3, 3)]
    assert epochs[2].loss < epochs[0].loss
    assert not model.training


def test_the_network_is_a_small_residual_one(training):
    model, _ = training
    assert sum(each.numel() for each in model.parameters()) == 174_970
    assert sum(isinstance(each, nn.BatchNorm2d) for each in model.modules()) == 15


def test_the_seed_decides_and_the_callers_state_stays(data):
    torch.manual_seed(5)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    first, again, other = (train(data, epochs=1, seed=seed).head.weight for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_task(data, training):
    model, _ = training
    task = data.task()
    batches = list(task.calibration)
    assert [len(labels) for _, labels in batches] == [64] * 4
    assert task.model_inputs(batches[0]).shape == (64, 1, 8, 8)
    assert len(task.training) == 1197 // 64
    assert task.metric == "top-1 (validation) %"
    assert task.evaluate(model) == top1(model, data.validation)
    loss = task.loss(model(batches[0][0]), batches[0])
    loss.backward()
    assert model.head.weight.grad is not None


def test_top1_is_the_percentage_of_right_answers(data):
    class Always3(nn.Module):
        def forward(self, x):
            return nn.functional.one_hot(torch.full((len(x),), 3), 10).float()

    threes = int((data.test.tensors[1] == 3).sum())
    assert top1(Always3(), data.test) == pytest.approx(100 * threes / 400)


def test_no_epochs(data):
    with pytest.raises(InputError, match="cannot train for 0 epochs"):
        train(data, epochs=0)


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=r'pip install "fxcompress\[demo\]"'):
        load_digits()
