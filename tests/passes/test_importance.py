"""Importance criteria: what each measures, against sums written out by hand; what they need; what they leave alone."""

import copy
import math

import pytest
import torch
from fxcompress.passes.channels import criteria
from fxcompress.passes.channels.criteria import Evidence, criterion, criterion_of, registry
from fxcompress.passes.channels.criteria.totals import by_weight
from models import inputs, settled
from torch import nn
from torch.nn import functional as F

import fxcompress as fxc
from fxcompress.errors import InputError

NEED_BATCHES = ["activation", "variance", "wanda", "flap", "output"]
NEED_LOSS = ["taylor", "fisher"]
IMAGES = inputs(2, 2, 6, 6)


class Stack(nn.Module):
    """Two convolutions with a batch norm between: one group of 5 channels."""

    def __init__(self, bias=True):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 5, 3, bias=bias)
        self.bn = nn.BatchNorm2d(5)
        self.conv2 = nn.Conv2d(5, 3, 1)

    def forward(self, x):
        return self.conv2(self.bn(self.conv1(x)).relu())


class Attention(nn.Module):
    """Self-attention of 2 heads x 3 dims, written out."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 6, bias=False) for _ in range(3))
        self.out = nn.Linear(6, 4, bias=False)

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (2, 3)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def traced(model, x=IMAGES):
    return fxc.trace(settled(model), x)


def task(*batches):
    return fxc.Task(calibration=batches or [IMAGES, inputs(3, 2, 6, 6, seed=2)], loss=lambda out, batch: square(out))


def square(out):
    return (out * torch.linspace(0, 1, out.numel(), dtype=out.dtype).reshape(out.shape)).square().mean()


def scored(program, name, task=None, group=0, **evidence):
    """The scores of one group's units."""
    report = program.analyze("channels")
    scores = criterion_of(name).measure(Evidence(program, report, task, **evidence))
    return torch.from_numpy(scores[report.groups[group].units])


def agree(found, expected):
    torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=1e-14)


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "each"), [("l1", torch.abs), ("l2", torch.square)])
def test_norms_add_up_all_that_goes_with_a_channel(name, each):
    model = settled(Stack())

    found = scored(fxc.trace(model, IMAGES), name)

    makers = each(model.conv1.weight).sum((1, 2, 3)) + each(model.conv1.bias)
    norm, readers = each(model.bn.weight) + each(model.bn.bias), each(model.conv2.weight).sum((0, 2, 3))
    agree(found, (makers + norm + readers) / 5)


def test_a_tied_weight_counts_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(4, 6, bias=False), nn.Linear(6, 4, bias=False)
            self.again = nn.Linear(4, 6, bias=False)
            self.again.weight = self.up.weight

        def forward(self, x):
            return self.down(self.up(x).relu() + self.again(x))

    model = settled(Tied())

    agree(
        scored(traced(model, inputs(2, 4)), "l2"),
        (model.up.weight.square().sum(1) + model.down.weight.square().sum(0)) / 2,
    )


def test_a_head_counts_with_all_its_dims_and_a_dim_with_all_its_heads():
    model = settled(Attention())
    before = traced(model, inputs(2, 7, 4))
    names = {(group.name, group.factor): number for number, group in enumerate(before.analyze("channels").groups)}

    heads = scored(before, "l2", group=names["q.weight:0", "outer"])
    dims = scored(before, "l2", group=names["q.weight:0", "inner"])

    q, k, v = (layer.weight.square().sum(1).reshape(2, 3) for layer in (model.q, model.k, model.v))
    out = model.out.weight.square().sum(0).reshape(2, 3)
    agree(heads, (q + k + v + out).sum(1) / 4)
    agree(dims, (q + k).sum(0) / 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_reduced_precision_is_summed_in_single_precision_or_better(dtype):
    model = nn.Sequential(nn.Linear(70_000, 3), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight.fill_(0.01)
        model[0].bias.zero_()
        model[1].weight.zero_()
    before = fxc.trace(model.to(dtype).eval(), torch.zeros(2, 70_000, dtype=dtype))

    exact = 70_000 * model[0].weight[0, 0].double() ** 2 / 3

    torch.testing.assert_close(scored(before, "l2"), exact.expand(3), rtol=1e-5, atol=0)


def test_lamp_divides_by_what_is_no_smaller():
    before = traced(Stack())
    squares = scored(before, "l2")

    expected = [squares[i] / squares[squares >= squares[i]].sum() for i in range(5)]

    agree(scored(before, "lamp"), torch.stack(expected))


def test_bn_gamma_is_the_scale():
    model = settled(Stack())

    agree(scored(traced(model), "bn-gamma"), model.bn.weight.abs())


def test_bn_gamma_says_nothing_of_channels_without_batch_norm():
    model = nn.Sequential(Stack(), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    before = traced(model)
    names = [group.name for group in before.analyze("channels").groups]

    assert scored(before, "bn-gamma", group=names.index("0.conv1.weight:0")).isfinite().all()
    assert scored(before, "bn-gamma", group=names.index("1.weight:0")).isnan().all()


def test_bn_gamma_needs_a_batch_norm():
    with pytest.raises(InputError, match=r"bn-gamma needs batch normalizations.*before fold-batchnorm"):
        scored(traced(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 2, 1))), "bn-gamma")


def test_fpgm_is_the_distance_to_all_other_filters():
    model = settled(Stack())
    filters = model.conv1.weight.flatten(1)

    expected = torch.stack([sum(torch.dist(a, b) for b in filters) for a in filters])

    torch.testing.assert_close(scored(traced(model), "fpgm"), expected.detach(), rtol=1e-12, atol=1e-12)


def test_fpgm_finds_the_filter_in_the_middle():
    model = settled(Stack())
    with torch.no_grad():
        model.conv1.weight[3] = model.conv1.weight.mean(0)

    assert scored(fxc.trace(model, IMAGES), "fpgm").argmin() == 3


def test_random_is_the_same_for_a_seed():
    before = traced(Stack())

    assert torch.equal(scored(before, "random", seed=3), scored(before, "random", seed=3))
    assert not torch.equal(scored(before, "random", seed=3), scored(before, "random", seed=4))


# --- batches ---------------------------------------------------------------------------------------------------------


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
