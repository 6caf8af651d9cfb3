"""Criteria that read batches: what each measures, against sums written out by hand."""

import copy

import pytest
import torch
from fxcompress.passes.channels.criteria import Evidence, criterion_of
from models import inputs, settled
from scoring import IMAGES, Attention, Stack, agree, scored, square, task, traced
from torch import nn
from torch.nn import functional as F

import fxcompress as fxc


def gates(model, batch):
    """Derivative of the loss by a factor on each of the channels between two layers without biases."""
    gate = torch.ones(5, dtype=torch.float64, requires_grad=True)
    hidden = model[0](batch).relu() * gate
    return torch.autograd.grad(square(model[2](hidden)), gate)[0]


def gated():
    return settled(nn.Sequential(nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False)))


def test_taylor_is_the_squared_derivative_by_a_gate_on_the_channel():
    model, batches = gated(), [inputs(6, 4, seed=seed) for seed in (3, 4, 5)]

    found = scored(traced(model, inputs(2, 4)), "taylor", task(*batches))

    agree(found, sum(gates(model, batch).square() for batch in batches) / 3)


def test_fisher_squares_before_it_adds_up():
    model, batches = gated(), [inputs(6, 4, seed=seed) for seed in (3, 4)]

    found = scored(traced(model, inputs(2, 4)), "fisher", task(*batches))

    expected = torch.zeros(5, dtype=torch.float64)
    for batch in batches:
        first, second = torch.autograd.grad(square(model(batch)), [model[0].weight, model[2].weight])
        expected += (first * model[0].weight).square().sum(1) + (second * model[2].weight).square().sum(0)
    agree(found, expected / 2 / 2)


def observed(model, batches):
    """What the second layer of :func:`gated` is given."""
    return torch.cat([model[0](batch).relu() for batch in batches]), model[2].weight.square().sum(0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("activation", lambda x, energy: x.square().mean(0)),
        ("variance", lambda x, energy: x.var(0, correction=0)),
        ("wanda", lambda x, energy: x.square().mean(0) * energy),
        ("flap", lambda x, energy: x.var(0, correction=0) * energy),
    ],
)
def test_statistics_are_those_of_what_readers_are_given(name, expected):
    model, batches = gated(), [inputs(6, 4, seed=3), inputs(2, 4, seed=4)]

    found = scored(traced(model, inputs(2, 4)), name, task(*batches))

    agree(found, expected(*observed(model, batches)))


def signs(*shape):
    """What `output` projects the outputs on, if it draws that first."""
    return torch.randint(2, shape, generator=torch.Generator().manual_seed(0)).mul(2).sub(1).double()


def test_output_is_the_mean_square_of_a_channel_times_that_of_the_derivative_by_it():
    model, batch = gated(), inputs(6, 4, seed=3)
    hidden = model[:2](batch).detach().requires_grad_()
    out = model[2](hidden)
    (out * signs(6, 3) / out.square().mean().sqrt().detach()).sum().backward()

    found = scored(traced(model, inputs(2, 4)), "output", fxc.Task(calibration=[batch]))

    expected = hidden.square().mean(0) * hidden.grad.square().sum(0)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=0)  # moments are of single precision


def test_output_knows_what_batch_norms_saw_in_training():
    """The batches never light up channels that training did."""
    model = settled(Stack(bias=False))
    with torch.no_grad():
        model.conv1.weight[2:4] = model.conv1.weight[2:3].abs()
        model.bn.running_mean[2:4] = 0
        for tensor in (model.bn.weight, model.bn.bias, model.bn.running_var):
            tensor[2:4] = 1
    dark = -10 * IMAGES.abs()
    folded = fxc.PassManager("fold-batchnorm").run(fxc.trace(model, IMAGES)).program

    def both(program, batch):
        return scored(program, "output", fxc.Task(calibration=[batch]))[2:4]

    assert both(folded, dark).sum() == 0
    assert (both(fxc.trace(model, IMAGES), dark) > 0).all()


def test_output_counts_a_channel_where_its_way_ends():
    """A depthwise convolution passes it on."""
    direct = settled(nn.Sequential(nn.Conv2d(2, 5, 1), nn.Conv2d(5, 3, 1)))
    passed = nn.Sequential(direct[0], nn.Conv2d(5, 5, 1, groups=5, bias=False), direct[1])
    with torch.no_grad():
        passed[1].weight.fill_(1)

    agree(
        scored(fxc.trace(passed.double().eval(), IMAGES), "output", task()),
        scored(fxc.trace(direct, IMAGES), "output", task()),
    )


class Pair(nn.Module):
    """Two convolutions; the second takes the samples as groups of one sample, as convolutions with weights of their
    own for each do."""

    def __init__(self, folded):
        super().__init__()
        self.conv1, self.conv2, self.folded = nn.Conv2d(2, 5, 3), nn.Conv2d(5, 3, 1, bias=False), folded

    def forward(self, x):
        x = self.conv1(x).relu()
        if not self.folded:
            return self.conv2(x)
        samples, channels, *size = x.shape
        weight = self.conv2.weight.repeat(samples, 1, 1, 1)
        return F.conv2d(x.reshape(1, samples * channels, *size), weight, groups=samples).reshape(samples, -1, *size)


@pytest.mark.parametrize("name", ["activation", "variance", "wanda", "flap", "output"])
def test_samples_that_are_folded_into_the_channels_are_places_of_the_channels(name):
    plain, folded = settled(Pair(False)), Pair(True).double().eval()
    folded.load_state_dict(plain.state_dict())

    found = scored(fxc.trace(folded, IMAGES), name, task())

    torch.testing.assert_close(found, scored(fxc.trace(plain, IMAGES), name, task()), rtol=1e-6, atol=0)


class Chosen(nn.Module):
    """A head that gives numbers, and one behind which there is no derivative."""

    def __init__(self):
        super().__init__()
        self.stem, self.head, self.inner, self.classes = (
            nn.Linear(4, 6),
            nn.Linear(6, 3),
            nn.Linear(6, 5),
            nn.Linear(5, 3),
        )

    def forward(self, x):
        x = self.stem(x).relu()
        return self.head(x), self.classes(self.inner(x).relu()).argmax(1)


def test_output_says_nothing_of_channels_without_a_derivative():
    program = traced(Chosen(), inputs(4, 4))

    groups = [scored(program, "output", task(inputs(8, 4)), group).isnan().all() for group in range(2)]

    assert groups == [False, True]


def test_output_needs_no_loss_and_does_not_depend_on_the_scale_of_outputs():
    model, batch = gated(), inputs(6, 4, seed=3)
    plain = scored(traced(model, inputs(2, 4)), "output", fxc.Task(calibration=[batch]))
    with torch.no_grad():
        model[2].weight.mul_(1000)

    scaled = scored(fxc.trace(model, inputs(2, 4)), "output", fxc.Task(calibration=[batch]))

    torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=0)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("transposed", [False, True])
def test_wanda_knows_the_groups_of_convolutions(groups, transposed):
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    model = settled(nn.Sequential(nn.Conv2d(2, 6, 1), kind(6, 6, 3, groups=groups), nn.Conv2d(6, 1, 1)))
    before = traced(model)
    mean = model[0](IMAGES).square().mean((0, 2, 3))
    weights = torch.zeros(6, dtype=torch.float64)
    for channel in range(6):
        probe = copy.deepcopy(model[1]).requires_grad_(False)
        x = torch.zeros(1, 6, 20, 20, dtype=torch.float64)
        x[0, channel, 10, 10] = 1
        probe.bias.zero_()
        weights[channel] = probe(x).square().sum()  # what the layer makes of a single 1

    found = criterion_of("wanda").measure(Evidence(before, before.analyze("channels"), task(IMAGES)))

    report = before.analyze("channels")
    carried = report.resolved(report.state["0.weight"][0][0])
    expected = (mean * weights).detach()
    for column in carried.T:  # several for groups x channels in a group
        for unit in set(column.tolist()):
            own = torch.from_numpy((carried == unit).any(1))
            torch.testing.assert_close(
                torch.tensor(found[unit]), unit_mean(report, unit, expected[own].sum(), model, mean)
            )


def unit_mean(report, unit, first, model, mean):
    """The mean over the readers of a unit: the middle layer, and the last one where the unit is there too."""
    after = report.resolved(report.state["2.weight"][1][0])
    own = torch.from_numpy((after == unit).any(1))
    if not own.any():
        return first
    hidden = model[1](model[0](IMAGES)).square().mean((0, 2, 3)) * model[2].weight.square().sum((0, 2, 3))
    return ((first + hidden[own].sum()) / 2).detach()


def test_queries_and_keys_are_scored_by_their_product():
    model, x = settled(Attention()), inputs(2, 7, 4)
    before = traced(model, x)
    names = {(group.name, group.factor): number for number, group in enumerate(before.analyze("channels").groups)}
    q, k = (layer(x).reshape(2, 7, 2, 3) for layer in (model.q, model.k))
    energy_q, energy_k = (y.square().sum(1).mean((0, 1)) for y in (q, k))
    mean_q, mean_k = (y.square().mean((0, 1, 2)) for y in (q, k))

    found = scored(before, "wanda", task(x), group=names["q.weight:0", "inner"])

    agree(found, (mean_q * energy_k + mean_k * energy_q) / 2)
