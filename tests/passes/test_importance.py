"""Importance criteria: what all of them share, what they need and what they leave alone."""

import math

import pytest
import torch
from fxcompress.passes.channels import criteria
from fxcompress.passes.channels.criteria import criterion, registry
from fxcompress.passes.channels.criteria.totals import by_weight
from models import inputs, settled
from scoring import IMAGES, Stack, agree, scored, square, task, traced
from torch import nn

import fxcompress as fxc
from fxcompress.errors import InputError

NEED_BATCHES = ["activation", "variance", "wanda", "flap", "output"]
NEED_LOSS = ["taylor", "fisher"]


@pytest.mark.parametrize("name", sorted(set(criteria.names()) - {"random", "fpgm"}))
def test_a_channel_that_is_dead_goes_first(name):
    model = settled(Stack())
    with torch.no_grad():
        for tensor in (model.conv1.weight, model.conv1.bias, model.bn.weight, model.bn.bias):
            tensor[2] = 0
        model.conv2.weight[:, 2] = 0

    scores = scored(fxc.trace(model, IMAGES), name, task())

    assert scores.argmin() == 2
    assert scores[2] == 0


@pytest.mark.parametrize("name", NEED_BATCHES + NEED_LOSS)
def test_looks_at_as_many_batches_as_asked(name):
    before, first = traced(Stack()), inputs(2, 2, 6, 6, seed=5)

    alone = scored(before, name, task(first))
    of_two = scored(before, name, task(first, IMAGES), batches=1)
    both = scored(before, name, task(first, IMAGES))

    agree(of_two, alone)
    assert not torch.allclose(both, alone)


@pytest.mark.parametrize("name", ["wanda", "taylor"])
def test_batches_come_in_any_form_that_the_task_knows(name):
    before = traced(Stack())
    plain = scored(before, name, task(IMAGES))

    for batch, take in [
        ((IMAGES, 7), None),
        ({"pixels": IMAGES}, lambda b: b["pixels"]),
        (IMAGES, lambda b: ((b,), {})),
    ]:
        given = fxc.Task(training=[batch], loss=lambda out, batch: square(out), inputs=take)
        agree(scored(before, name, given), plain)


def test_training_batches_are_drawn_with_the_seed():
    before = traced(Stack())
    loader = torch.utils.data.DataLoader(inputs(16, 2, 6, 6), 2, shuffle=True)
    given = fxc.Task(training=loader, loss=lambda out, batch: square(out))
    state = torch.random.get_rng_state()

    first, again, other = (scored(before, "taylor", given, seed=seed, batches=2) for seed in (1, 1, 2))

    agree(first, again)
    assert not torch.allclose(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)


# --- what it leaves alone --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", criteria.names())
def test_nothing_of_the_model_changes(name):
    model = settled(Stack())
    model.conv2.weight.requires_grad_(False)
    before = fxc.trace(model, IMAGES)
    before.graph_module.train()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}

    fxc.analyze(before, f"select-channels{{criterion={name}}}", task())

    assert before.graph_module.training
    assert all(parameter.grad is None for parameter in (*model.parameters(), *before.graph_module.parameters()))
    assert [p.requires_grad for p in before.graph_module.parameters()] == [p.requires_grad for p in model.parameters()]
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[key]), key


@pytest.mark.parametrize("name", ["taylor", "fisher"])
def test_frozen_parameters_are_scored_as_well(name):
    model = settled(Stack()).requires_grad_(False)

    assert (scored(fxc.trace(model, IMAGES), name, task()) > 0).all()


def test_the_loss_is_that_of_eval_mode():
    model = settled(nn.Sequential(nn.Linear(4, 5, bias=False), nn.Dropout(0.9), nn.Linear(5, 3, bias=False)))
    before = traced(model, inputs(2, 4))
    before.graph_module.train()

    agree(
        scored(before, "taylor", task(inputs(6, 4))), scored(traced(model, inputs(2, 4)), "taylor", task(inputs(6, 4)))
    )


# --- what is missing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("taylor", None, r"criterion=taylor needs a loss and batches.*Task\(training=\.\.\., loss=\.\.\.\)"),
        ("fisher", fxc.Task(training=[IMAGES]), r"criterion=fisher needs a loss.*Task\(loss"),
        ("taylor", fxc.Task(loss=lambda out, batch: square(out)), r"criterion=taylor needs batches.*training"),
        ("flap", None, r"criterion=flap needs batches.*calibration"),
        ("wanda", fxc.Task(loss=lambda out, batch: square(out)), r"criterion=wanda needs batches.*calibration"),
        (
            "taylor",
            fxc.Task(training=[IMAGES], loss=lambda out, b: out.square()),
            r"Task.loss gave a tensor of shape \(2, ",
        ),
        ("taylor", fxc.Task(training=[IMAGES], loss=lambda out, b: 1.0), "Task.loss gave 1.0"),
        (
            "taylor",
            fxc.Task(training=[IMAGES], loss=lambda out, b: out.detach().mean()),
            "one scalar.*from the outputs",
        ),
    ],
)
def test_says_what_the_task_lacks(name, given, message):
    with pytest.raises(InputError, match=message):
        fxc.analyze(traced(Stack()), f"select-channels{{criterion={name}}}", given)


@pytest.mark.parametrize("name", ["l2", "taylor"])
def test_weights_without_values_cannot_be_compared(name):
    before = fxc.trace(Stack().eval().to("meta"), torch.empty(2, 2, 6, 6, device="meta"))

    with pytest.raises(InputError, match=r"conv1.weight is on the meta device.*criterion=random"):
        scored(before, name, task())
    assert scored(before, "random").isfinite().all()


def test_an_unknown_criterion_is_named_with_its_neighbours():
    with pytest.raises(InputError, match="no criterion 'tailor'; did you mean 'taylor'"):
        fxc.PassManager("select-channels{criterion=tailor}")
    with pytest.raises(InputError, match="no criterion 'zzz'; criteria: activation, bn-gamma"):
        fxc.PassManager("select-channels{criterion=zzz}")


# --- a criterion of one's own ----------------------------------------------------------------------------------------


@pytest.fixture
def cubes(monkeypatch):
    monkeypatch.setattr(registry, "_CRITERIA", dict(registry._CRITERIA))

    @criterion("cubes")
    def measure(evidence):
        return by_weight(evidence, lambda weight: weight.abs() ** 3)

    return measure


def test_a_criterion_of_ones_own_is_an_option_like_the_others(cubes):
    model = settled(nn.Sequential(nn.Linear(4, 5, bias=False), nn.Linear(5, 3, bias=False)))
    before = traced(model, inputs(2, 4))

    scores = (model[0].weight.abs() ** 3).sum(1) + (model[1].weight.abs() ** 3).sum(0)
    plan = fxc.analyze(before, "select-channels{ratio=0.4 criterion=cubes}")

    assert plan.removals[0].removed == tuple(sorted(scores.argsort()[:2].tolist()))


def test_a_name_is_given_once(cubes):
    with pytest.raises(InputError, match="'cubes' is defined twice"):
        criterion("cubes")(cubes)


def test_infinite_scores_are_no_scores():
    """They would make an order that means nothing."""
    given = fxc.Task(training=[IMAGES], loss=lambda out, batch: square(out) * math.inf)

    plan = fxc.analyze(traced(Stack()), "select-channels{criterion=taylor}", given)

    assert plan.removals == ()
    assert "no-score [taylor]: this criterion gives no finite score to conv1.weight:0" in plan.explain()
