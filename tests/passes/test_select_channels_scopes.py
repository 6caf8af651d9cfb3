"""select-channels: what is ranked together, and the ratio that leaves a share of the MACs."""

import pytest
import torch
from models import residual_net, settled
from pruning import Sequential, Wire
from selecting import IMAGE, TOKENS, Attention, chain, counts, plan, traced
from torch import nn

import fxcompress as fxc
from fxcompress.errors import InputError

# --- scope -----------------------------------------------------------------------------------------------------------


def scaled(**scales):
    """A chain whose batch norms have these scales, times 1 to 8 by channel."""
    model = settled(
        Sequential(
            a=nn.Conv2d(3, 8, 1), na=nn.BatchNorm2d(8), ra=nn.ReLU(), b=nn.Conv2d(8, 8, 1), nb=nn.BatchNorm2d(8),
            rb=nn.ReLU(), c=nn.Conv2d(8, 8, 3), nc=nn.BatchNorm2d(8), rc=nn.ReLU(), last=nn.Conv2d(8, 2, 1),
        )
    )  # fmt: skip
    with torch.no_grad():
        for name, scale in scales.items():
            getattr(model, name).weight.copy_(scale * torch.arange(1, 9))
    return fxc.trace(model, IMAGE)


def test_global_ranks_the_units_of_all_groups_together():
    before = scaled(na=1, nb=2, nc=100)

    # 12 of 24: 1 2 2 3 4 4 5 6 6 7 8 8, which are all of the first group but its last, and 4 of the second
    assert counts(before, "{criterion=bn-gamma scope=global}") == {"a": 7, "b": 5}
    assert counts(before, "{criterion=bn-gamma}") == {"a": 4, "b": 4, "c": 4}


def test_global_keeps_the_least_width_of_each_group():
    assert counts(scaled(na=1, nb=2, nc=100), "{criterion=bn-gamma scope=global min-width=3}") == {
        "a": 5,
        "b": 5,
        "c": 2,
    }


def test_global_measures_norms_by_the_mean_of_their_group():
    """A layer with weights ten times as large is not ten times as important."""
    plain, scaled = settled(chain(16, 16)), settled(chain(16, 16))
    with torch.no_grad():
        for tensor in (scaled.conv1.weight, scaled.conv1.bias, scaled.last.weight):
            tensor.mul_(10)

    found = [counts(fxc.trace(model, IMAGE), "{criterion=fpgm scope=global}") for model in (plain, scaled)]

    assert found[0] == found[1]
    assert sum(found[0].values()) == 16


def test_isomorphic_ranks_groups_that_are_built_alike():
    """Sizes do not count: a, b and c are read by convolutions alike."""
    before = scaled(na=1, nb=2, nc=100)

    assert counts(before, "{criterion=bn-gamma scope=isomorphic}") == {"a": 7, "b": 5}


def test_isomorphic_keeps_apart_what_different_operators_read():
    """b is read by a linear layer."""
    model = settled(
        Wire(
            lambda m, x: m.last(m.nb(m.b(m.na(m.a(x)).relu())).relu().mean((2, 3))),
            a=nn.Conv2d(3, 8, 1),
            na=nn.BatchNorm2d(8),
            b=nn.Conv2d(8, 8, 1),
            nb=nn.BatchNorm2d(8),
            last=nn.Linear(8, 2),
        )
    )
    with torch.no_grad():
        model.nb.weight.mul_(1000)
    before = fxc.trace(model, IMAGE)

    assert counts(before, "{criterion=bn-gamma scope=isomorphic}") == {"a": 4, "b": 4}
    assert counts(before, "{criterion=bn-gamma scope=global}") == {"a": 7, "b": 1}


def test_groups_with_a_ratio_of_their_own_are_ranked_among_themselves():
    before = scaled(na=1, nb=2, nc=100)

    found = counts(before, "{criterion=bn-gamma scope=global ratios={c:0.25 a:0.25} ratio=0.5}")

    assert found == {"a": 4, "b": 4}


# --- MACs ------------------------------------------------------------------------------------------------------------


def grouped():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.Conv2d(16, 32, 3, groups=4),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 8, 2, groups=2),
        nn.Conv2d(8, 2, 1),
    )


def recurrent():
    lstm = nn.LSTM(8, 16, 2, batch_first=True)
    return Wire(lambda m, x: m.head(m.lstm(x)[0]), lstm=lstm, head=nn.Linear(16, 3))


def einsum():
    w = nn.Parameter(torch.ones(24, 5))
    return Wire(lambda m, x: torch.einsum("btc,cd->btd", m.up(x), m.w), up=nn.Linear(8, 24), w=w)


def attention():
    return nn.Sequential(Attention(4, 8), nn.ReLU(), Attention(2, 16))


MODELS = {
    "chain": lambda: (chain(32, 48, 64), IMAGE),
    "residual": lambda: (residual_net(), IMAGE),
    "grouped": lambda: (grouped(), IMAGE),
    "attention": lambda: (attention(), TOKENS),
    "recurrent": lambda: (recurrent(), TOKENS),
    "einsum": lambda: (einsum(), TOKENS),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", ["", "{macs=0.6}", "{macs=0.7 round-to=4}", "{ratio=0.3 scope=global}"])
def test_the_plan_knows_what_the_slim_model_costs(name, options):
    model, x = MODELS[name]()
    before = traced(model, x)

    done = fxc.PassManager(f"select-channels{options},remove-channels").run(before)

    macs = done.records[0].value.macs
    assert macs == (fxc.analyze(before, "cost").macs, fxc.analyze(done.program, "cost").macs)
    assert macs[1] < macs[0]


@pytest.mark.parametrize("share", [0.9, 0.5, 0.2])
@pytest.mark.parametrize("scope", ["uniform", "global", "isomorphic"])
def test_macs_are_near_the_target_and_below_it(share, scope):
    before = traced(chain(64, 64, 64))

    found = plan(before, f"{{macs={share} scope={scope}}}")

    assert found.macs[1] <= share * found.macs[0]
    assert found.macs[1] > (share - 0.01) * found.macs[0]  # a channel more of each group is 3 % more


def test_all_macs_may_stay():
    assert plan(chain(64), "{macs=1}").removals == ()


def test_groups_compete_by_importance_for_each_mac_saved():
    """Channels of `late` see a ninth of the places: as important, they save far less."""
    model = settled(
        Sequential(
            early=nn.Conv2d(3, 12, 1), n1=nn.BatchNorm2d(12), r1=nn.ReLU(), stride=nn.Conv2d(12, 12, 1, stride=3),
            late=nn.Conv2d(12, 12, 1), n2=nn.BatchNorm2d(12), r2=nn.ReLU(), last=nn.Conv2d(12, 2, 1),
        )
    )  # fmt: skip
    with torch.no_grad():
        model.n1.weight.copy_(torch.arange(1, 13))
        model.n2.weight.copy_(torch.arange(1, 13))
    before, task = fxc.trace(model, IMAGE), fxc.Task(calibration=[IMAGE])

    by_units, by_macs = (
        counts(before, f"{{criterion=output scope=global ignore=[stride] {how}}}", task=task)
        for how in ("ratio=0.5", "macs=0.7")
    )

    assert by_units["late"] > by_units["early"]
    assert by_macs["early"] * by_units["late"] > 2 * by_units["early"] * by_macs["late"]


def test_what_saves_no_macs_stays_when_macs_are_asked_for():
    model = Wire(
        lambda m, x: m.convs(x) * (m.p * m.q).sum(0),
        convs=chain(16, 16), p=nn.Parameter(torch.ones(8)), q=nn.Parameter(torch.ones(8)),
    )  # fmt: skip

    before = traced(model)
    task = fxc.Task(training=[IMAGE], loss=lambda out, batch: out.square().mean())

    assert counts(before, "{ratio=0.5}")["p:0"] == 4
    assert set(counts(before, "{macs=0.5 criterion=fisher scope=global}", task=task)) == {"convs.conv0", "convs.conv1"}


def test_macs_out_of_reach_are_an_error():
    with pytest.raises(InputError, match=r"macs=0.1 cannot be reached: .* 5\d\.\d% of the MACs stay"):
        plan(chain(64, 64), "{macs=0.1 ignore=[conv0] min-width=32}")


def test_ratios_of_patterns_stay_while_macs_are_searched():
    found = plan(chain(64, 64), "{macs=0.5 ratios={conv0:0.25}}")

    assert len(found.removals[0].removed) == 16
    assert found.removals[1].reason.startswith("l2, ratio 0.")
    assert found.removals[0].reason == "l2, ratio 0.25 of 'conv0'"
