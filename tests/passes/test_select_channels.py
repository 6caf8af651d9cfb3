"""select-channels: how many units go, which, from where; what is aligned, what is kept, and what is an error."""

import math

import pytest
import torch
from fxcompress.passes.channels.criteria import Evidence, criterion_of
from fxcompress.passes.select_channels import SelectChannels
from models import residual_net, settled
from pruning import Wire, lengths, shapes
from selecting import IMAGE, TOKENS, Attention, chain, counts, plan, removed, traced
from torch import nn

import fxcompress as fxc
from fxcompress.errors import InputError
from fxcompress.pipeline.text import parse

# --- how many, and which ---------------------------------------------------------------------------------------------


def test_half_of_each_group_goes_by_default():
    assert counts(chain(8, 12), "") == {"conv0": 4, "conv1": 6}


@pytest.mark.parametrize(("ratio", "gone"), [(0, 0), (0.01, 1), (0.29, 29), (0.57, 57), (0.999, 99)])
def test_a_ratio_is_a_share_of_the_units_and_never_all(ratio, gone):
    assert counts(chain(100), f"{{ratio={ratio}}}") == ({"conv0": gone} if gone else {})


def test_the_least_important_go():
    model = settled(chain(6))
    with torch.no_grad():
        for place, scale in enumerate((5, 1, 4, 2, 6, 3)):
            model.conv0.weight[place] = scale
            model.last.weight[:, place] = scale
            model.conv0.bias[place] = 0

    found = plan(fxc.trace(model, IMAGE), "{ratio=0.5}")

    assert found.removals[0].removed == (1, 3, 5)


def test_equal_scores_go_in_the_order_of_the_model():
    model = settled(chain(6))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1)

    assert plan(fxc.trace(model, IMAGE), "{ratio=0.5}").removals[0].removed == (0, 1, 2)


def test_the_seed_decides_a_random_choice():
    before = traced(chain(40))
    same, again, other = (
        plan(before, f"{{criterion=random seed={seed} ratio=0.{r}}}") for seed, r in ((1, 5), (1, 50), (2, 5))
    )

    assert same.removals[0].removed == again.removals[0].removed != other.removals[0].removed


# --- patterns --------------------------------------------------------------------------------------------------------


def test_patterns_set_ratios_and_the_first_that_matches_wins():
    found = counts(chain(10, 10, 10), "{ratio=0.5 ratios={conv1:0.2 conv*.weight:0.3}}")

    assert found == {"conv0": 3, "conv1": 2, "conv2": 3}


def test_a_ratio_of_none_keeps_a_group():
    assert counts(chain(10, 10), "{ratios={conv0.*:0}}") == {"conv1": 5}


def test_a_pattern_means_the_layers_that_make_the_channels():
    """Every layer reads those of the one before."""
    model = nn.Sequential(chain(10), nn.Conv2d(2, 10, 1), nn.Conv2d(10, 2, 1))

    assert counts(model, "{ignore=[1]}") == {"0.conv0": 5, "0.last": 1}
    assert counts(model, "{ignore=[0.*]}") == {"1": 5}


def test_a_pattern_with_a_dim_means_the_channels_that_are_there():
    assert counts(chain(10, 10), '{ignore=["last.weight:1"]}') == {"conv0": 5}


def test_a_residual_stream_goes_by_any_layer_that_writes_it():
    model = Wire(
        lambda m, x: m.head(m.b(m.a(m.stem(x)).relu()) + m.stem(x)),
        stem=nn.Conv2d(3, 8, 1), a=nn.Conv2d(8, 6, 1), b=nn.Conv2d(6, 8, 1), head=nn.Conv2d(8, 2, 1),
    )  # fmt: skip

    assert counts(model, "{ignore=[b]}") == {"a": 3}
    assert counts(model, "{ignore=[stem]}") == {"a": 3}
    assert counts(model, "{ignore=[a]}") == {"stem": 4}


def test_any_name_of_a_tied_parameter_will_do():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mix, self.up = nn.Embedding(9, 8), nn.Linear(8, 12), nn.Linear(12, 8)
            self.head = nn.Linear(8, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            x = self.embed(ids)
            return self.head(x + self.up(self.mix(x).relu()))

    ids = torch.arange(12).reshape(2, 6) % 9

    for name in ("embed", "head", "head.weight"):
        assert counts(Tied(), f"{{ignore=[{name}]}}", ids) == {"mix": 6}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{ignore=[conv9]}", r"the pattern 'conv9' in ignore matches no parameter; did you mean 'conv0'"),
        ("{ratios={layer4.*:0.3}}", r"the pattern 'layer4.\*' in ratios matches no parameter"),
        ("{ignore=[last]}", r"'last' in ignore .*only read .* give ignore .last.weight:1., with the dim"),
        ('{ignore=["conv0.weight:2"]}', r"'conv0.weight:2' in ignore matches no parameter"),
        ("{ignore=[tail]}", r"'tail' in ignore matches only parameters that nothing can be removed from"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(options, message):
    model = Wire(
        lambda m, x: m.last(m.conv0(x).relu()).flatten(1) + m.tail,
        conv0=nn.Conv2d(3, 8, 3, 2, 1), last=nn.Conv2d(8, 2, 1), tail=nn.Parameter(torch.ones(32)),
    )  # fmt: skip

    with pytest.raises(InputError, match=message):
        plan(model, options)


# --- alignment and least widths --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "ratio", "kept"), [(64, 0.5, 32), (64, 0.6, 32), (64, 0.9, 8), (20, 0.5, 16), (6, 0.5, 6)]
)
def test_kept_counts_are_rounded_up(width, ratio, kept):
    assert counts(chain(width), f"{{ratio={ratio} round-to=8}}").get("conv0", 0) == width - kept


@pytest.mark.parametrize(
    ("heads", "dims", "ratio", "kept"),
    [
        (8, 16, 0.5, (4, 8)),  # 4 x 8 is a multiple of 8 as it is
        (6, 20, 0.5, (4, 10)),  # 3 x 20 is none: a head more, then 4 x 10 is one
        (4, 6, 0.3, (4, 6)),  # 2.8 heads x 6 dims: both round up to all
    ],
)
def test_heads_and_head_dims_are_rounded_by_the_elements_of_their_product(heads, dims, ratio, kept):
    before = traced(Attention(heads, dims), TOKENS)

    done = fxc.PassManager(f"select-channels{{ratio={ratio} round-to=8}},remove-channels").run(before)

    assert shapes(done.program)["out"][1] == math.prod(kept)
    assert shapes(done.program)["out"][1] % 8 == 0


def test_channels_that_are_there_twice_are_rounded_by_what_is_there():
    """Half as many channels do for a dim that has each of them twice."""
    model = Wire(
        lambda m, x: m.last(torch.cat([m.conv(x), m.conv(x).relu()], 1)),
        conv=nn.Conv2d(3, 12, 1),
        last=nn.Conv2d(24, 2, 1),
    )
    single = chain(12)

    assert counts(model, "{ratio=0.5 round-to=4}") == {"conv": 4}  # 8 of 12: conv itself has each once
    assert counts(single, "{ratio=0.5 round-to=4}") == {"conv0": 4}


def test_at_least_the_least_width_stays():
    assert counts(chain(4, 8, 32), "{ratio=0.9 min-width=6}") == {"conv1": 2, "conv2": 26}


# --- factors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("factors", "heads", "dims"), [("all", 2, 3), ("outer", 2, 0), ("inner", 0, 3)])
def test_factors_of_a_product_can_be_told_apart(factors, heads, dims):
    found = removed(plan(Attention(4, 6), f"{{factors={factors}}}", TOKENS))

    units = sum(count for (name, factor), count in found.items() if name == "qkv" and factor == "outer")
    inner = {count for (name, factor), count in found.items() if name == "qkv" and factor == "inner"}
    assert units == heads
    assert inner <= ({dims} if dims else set())
    assert bool(inner) == bool(dims)


@pytest.mark.parametrize("factors", ["all", "outer", "inner"])
def test_plain_channels_are_no_factor(factors):
    model = nn.Sequential(Attention(4, 6), nn.Linear(8, 10), nn.Linear(10, 8))

    assert removed(plan(model, f"{{factors={factors}}}", TOKENS))["1", "whole"] == 5


# --- nothing may end up empty ----------------------------------------------------------------------------------------


def gated(m, x):
    """The first 3 channels of 12 gate all of them: no parameter tells them apart from the others."""
    y = m.conv(x)
    return m.last(y * y[:, :3].sigmoid().mean(1, keepdim=True))


def paired(m, x):
    """Channels 0 and 1, and 2 and 3, meet in pieces of a split."""
    first, second, rest = m.conv(x).split([2, 2, 8], 1)
    return m.last(torch.cat([first, second, rest], 1)) * (first * second).mean(1, keepdim=True)


@pytest.mark.parametrize(("wiring", "few"), [(gated, 3), (paired, 4)])
@pytest.mark.parametrize("options", ["{ratio=0.5}", "{ratio=0.9}", "{ratio=0.5 round-to=4}", "{macs=0.5}"])
def test_the_best_of_a_slice_stays_where_all_of_it_would_go(wiring, few, options):
    model = settled(Wire(wiring, conv=nn.Conv2d(3, 12, 1), last=nn.Conv2d(12, 2, 1)))
    with torch.no_grad():
        for place in range(few):
            model.conv.weight[place] = model.last.weight[:, place] = 1e-3 * (2 if place == 1 else 1)
            model.conv.bias[place] = 0

    done = fxc.PassManager(f"select-channels{options},remove-channels").run(fxc.trace(model, IMAGE))

    kept = done.program.graph_module.get_parameter("conv.weight")
    assert (kept == 2e-3).all((1, 2, 3)).sum() == 1
    if "round-to" in options:
        assert len(kept) % 4 == 0


def test_a_single_channel_stays():
    assert counts(chain(1, 8), "{ratio=0.9}") == {"conv1": 7}


# --- nothing to remove -----------------------------------------------------------------------------------------------


def test_a_model_with_nothing_removable_stays_and_says_why():
    before = traced(nn.Conv2d(3, 4, 3))

    done = fxc.PassManager("select-channels,remove-channels").run(before)

    assert not done.records[1].changed
    assert done.program.text() == before.text()
    codes = {refusal.code: str(refusal) for refusal in done.report.refusals}
    assert "no parameter has a channel that can go" in codes["nothing-removable"]
    assert "weight:0 (4 channels)" in codes["frozen"]
    assert "output" in codes["frozen"]


def test_a_barrier_is_named_with_the_way_to_it():
    model = Wire(lambda m, x: m.last(m.conv(x).relu().matrix_exp()), conv=nn.Conv2d(3, 8, 3), last=nn.Conv2d(8, 2, 1))

    found = plan(model, "")

    assert found.removals == ()
    (barrier,) = [refusal for refusal in found.refusals if refusal.code == "unknown-operator"]
    assert barrier.node == "matrix_exp"
    assert "conv.weight -> conv -> relu -> matrix_exp" in barrier.reason
    assert "matrix_exp.default has no dependency rule" in barrier.reason
    assert "last.weight:1" not in barrier.reason


def test_a_group_without_a_score_stays_and_is_named():
    found = plan(
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)),
        "{criterion=bn-gamma}",
    )

    assert removed(found) == {("0", "whole"): 4}
    assert "no-score [bn-gamma]: this criterion gives no finite score to 2.weight:0" in found.explain()


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{ratio=1}", "ratio must be at least 0 and below 1, not 1"),
        ("{ratio=-0.1}", "ratio must be at least 0 and below 1, not -0.1"),
        ("{ratios={conv0:1.5}}", "ratios of 'conv0' must be at least 0 and below 1, not 1.5"),
        ("{macs=0}", "macs must be above 0 and at most 1, not 0"),
        ("{macs=1.2}", "macs must be above 0 and at most 1, not 1.2"),
        ("{ratio=0.5 macs=0.5}", "ratio and macs both say how much to remove; give one"),
        ("{round-to=0}", "round-to must be at least 1, not 0"),
        ("{min-width=0}", "min-width must be at least 1, not 0"),
        ("{batches=0}", "batches must be at least 1, not 0"),
        ("{scope=globl}", "did you mean 'global'"),
        ("{factors=heads}", "one of all, outer, inner"),
        ("{criterion=rndom}", "no criterion 'rndom'; did you mean 'random'"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(options, message):
    with pytest.raises(InputError, match=message):
        fxc.PassManager(f"select-channels{options}")


def test_options_are_pipeline_text():
    text = (
        'select-channels{macs=0.8 ratios={layer4.*:0.3 fc.weight:0.1} ignore=[stem.* "head.weight:1"] criterion=taylor '
        "scope=isomorphic factors=outer round-to=8 min-width=4 batches=2 seed=1}"
    )

    (item,) = parse(text)

    assert item == SelectChannels(
        macs=0.8, ratios={"layer4.*": 0.3, "fc.weight": 0.1}, ignore=("stem.*", "head.weight:1"), criterion="taylor",
        scope="isomorphic", factors="outer", round_to=8, min_width=4, batches=2, seed=1,
    )  # fmt: skip
    assert parse(str(item)) == parse(text)


def test_selecting_changes_nothing():
    model = settled(residual_net())
    before = fxc.trace(model, IMAGE)
    text, state = before.text(), {name: tensor.clone() for name, tensor in model.state_dict().items()}

    plan(before, "{macs=0.5}")

    assert before.text() == text
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert lengths(before)


def test_scores_decide_alone():
    """The units that go are those of the least scores, in each group of a model with every kind of factor."""
    before = traced(nn.Sequential(Attention(4, 6), nn.Linear(8, 10), nn.Linear(10, 8)), TOKENS)
    report = before.analyze("channels")
    scores = criterion_of("l1").measure(Evidence(before, report))

    for removal in plan(before, "{criterion=l1 ratio=0.4}").removals:
        own = scores[report.groups[removal.group].units]
        gone = own[list(removal.removed)]
        stays = [own[place] for place in range(len(own)) if place not in removal.removed]
        assert max(gone) <= min(stays)
