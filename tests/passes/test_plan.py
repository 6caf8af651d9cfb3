"""Plans of channel removal: what they say, how they are kept, and when they are refused."""

import dataclasses
import json

import pytest
import torch
from fxcompress.passes.channels.plan import ChannelPlan, Removal, digest
from fxcompress.passes.remove_channels import RemoveChannels
from models import inputs, residual_net, settled
from pruning import Sequential, Wire, shapes
from torch import nn

import fxcompress as fxc
from fxcompress.errors import InputError
from fxcompress.pass_base import Refusal

IMAGE = inputs(2, 3, 8, 8)
TEXT = "select-channels{ratio=0.25 ignore=[0.conv1]}"


def traced(model, x=IMAGE):
    return fxc.trace(settled(model), x)


@pytest.fixture(scope="module")
def before():
    return traced(residual_net())


@pytest.fixture(scope="module")
def plan(before):
    return fxc.analyze(before, TEXT)


def normed(groups=2):
    return Sequential(conv=nn.Conv2d(3, 8, 3), norm=nn.GroupNorm(groups, 8), last=nn.Conv2d(8, 2, 1))


# --- what a plan says ------------------------------------------------------------------------------------------------


def test_explains_what_goes_and_what_stays(plan, golden):
    golden("channel-plan", plan.explain() + "\n")


def test_explains_a_plan_that_removes_nothing():
    found = fxc.analyze(traced(nn.Conv2d(3, 4, 3)), "select-channels")

    assert found.explain().startswith(
        "select-channels removes nothing.\n\nWhat stays:\n  frozen [output]: weight:0 (4 channels)"
    )


def test_explains_a_plan_that_somebody_wrote():
    found = ChannelPlan("abc", (Removal(0, "conv.weight:0", "whole", 8, (1,), ("conv.weight:0",), "it is noise"),))

    assert found.explain().startswith("the plan removes 1 of 8 units from 1 group.\n")
    assert "it is noise" in found.explain()


def test_counts_in_its_repr(plan):
    gone = sum(len(removal.removed) for removal in plan.removals)

    assert repr(plan) == f"ChannelPlan(removes {gone} units from {len(plan.removals)} groups)"


def test_a_long_way_is_told_by_its_operators():
    """The first convolution's channels stay for an addition of the input, far down."""
    model = Wire(
        lambda m, x: m.last(m.b(m.a(x).relu()) + x).sum((2, 3)),
        a=nn.Conv2d(3, 6, 1), b=nn.Conv2d(6, 3, 1), last=nn.Conv2d(3, 2, 1),
    )  # fmt: skip

    (added,) = [refusal for refusal in fxc.analyze(traced(model), "select-channels").refusals if refusal.node == "add"]

    assert added.reason.startswith("b.weight:0 (3 channels), b.bias:0 (3 channels)")
    assert "b.weight -> b -> add; aten.add.Tensor" in added.reason


# --- keeping a plan --------------------------------------------------------------------------------------------------


def test_comes_back_from_json(plan):
    assert ChannelPlan.from_json(plan.to_json()) == plan
    assert ChannelPlan.from_json(json.dumps(json.loads(plan.to_json()))) == plan
    assert plan.refusals
    assert plan.removals


@pytest.mark.parametrize(
    "plan",
    [ChannelPlan("abc", ()), ChannelPlan("abc", (), (Refusal("code", "node", 'quotes " and\nlines'),), "mine", (5, 3))],
    ids=["empty", "odd"],
)
def test_any_plan_comes_back(plan):
    assert ChannelPlan.from_json(plan.to_json()) == plan


def test_a_group_is_a_line_of_json(plan):
    lines = plan.to_json().splitlines()

    assert sum('"removed"' in line for line in lines) == len(plan.removals)


def test_applies_later_to_what_was_saved(before, plan, tmp_path):
    fxc.save(before, tmp_path / "model.pt2")
    (tmp_path / "plan.json").write_text(plan.to_json())

    late = fxc.PassManager([RemoveChannels(plan=str(tmp_path / "plan.json"))]).run(fxc.load(tmp_path / "model.pt2"))
    now = fxc.PassManager(f"{TEXT},remove-channels").run(before)

    assert shapes(late.program) == shapes(now.program)
    state = now.program.graph_module.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in late.program.graph_module.state_dict().items())


# --- another model ---------------------------------------------------------------------------------------------------


def test_weights_and_batch_do_not_count(before):
    other = fxc.trace(settled(residual_net(), seed=5), inputs(5, 3, 8, 8))

    assert digest(other) == digest(before)


class Joined(nn.Module):
    """Two layers, joined in some order."""

    def __init__(self, swapped):
        super().__init__()
        self.a, self.b, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 2, 1)
        self.swapped = swapped

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        return self.last(torch.cat([b, a] if self.swapped else [a, b], 1))


class Looked(nn.Module):
    """Channels in an order that is in a constant."""

    def __init__(self, order):
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
        self.order = torch.tensor(order)

    def forward(self, x):
        return self.last(self.conv(x)[:, self.order])


class MaybeTied(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.a, self.b, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
        if tied:
            self.b.weight = self.a.weight

    def forward(self, x):
        return self.last(self.a(x).relu()) + self.last(self.b(x))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda: normed(2), lambda: normed(4)),
        (lambda: Joined(False), lambda: Joined(True)),
        (lambda: Looked([0, 1, 2, 3]), lambda: Looked([0, 2, 1, 3])),
        (lambda: nn.Conv2d(3, 4, 1), lambda: nn.Conv2d(3, 5, 1)),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.GELU())),
        (lambda: nn.Conv2d(3, 4, 2), lambda: nn.Conv2d(3, 4, 2, stride=2)),
    ],
    ids=["groups", "order", "index", "width", "activation", "stride"],
)
def test_what_a_unit_is_counts(one, other):
    assert digest(traced(one())) == digest(traced(one()))
    assert digest(traced(one())) != digest(traced(other()))


def test_what_is_tied_counts():
    assert digest(traced(MaybeTied(True))) != digest(traced(MaybeTied(False)))


def test_refuses_another_structure(plan):
    program = traced(normed())

    with pytest.raises(InputError, match=r"for another model \(structure [0-9a-f]{12}, this one is [0-9a-f]{12}\)"):
        plan.mask(program, program.analyze("channels"))


def test_refuses_the_model_that_it_has_slimmed(before, plan):
    slim = fxc.PassManager(f"{TEXT},remove-channels").run(before).program

    with pytest.raises(InputError, match="for another model"):
        plan.mask(slim, slim.analyze("channels"))


# --- plans that are wrong --------------------------------------------------------------------------------------------


def edited(plan, **change):
    data = json.loads(plan.to_json())
    data["removals"][0].update(change)
    return ChannelPlan.from_json(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group": 99}, r"group 99 .*the model has \d groups"),
        ({"group": -1}, "group -1"),
        ({"removed": [400]}, "removes unit 400"),
        ({"removed": [-1]}, "removes unit -1"),
        ({"removed": [0, 1, 2, 3, 3]}, "all 4 units"),
        ({"removed": [1, 1]}, "units of group 0.conv1.weight:0 twice"),
        ({"size": 7}, "of 7 whole units, but in this model it is 0.conv1.weight:0 of 4 whole"),
        ({"name": "fc.weight:0"}, "group 0 is fc.weight:0 of .* is 0.conv1.weight:0"),
    ],
)
def test_refuses_what_the_groups_do_not_have(before, change, message):
    plan = fxc.analyze(before, "select-channels")

    with pytest.raises(InputError, match=message):
        edited(plan, **change).mask(before, before.analyze("channels"))


def test_refuses_to_leave_nothing_of_a_value():
    model = Wire(
        lambda m, x: m.last(m.conv(x) * m.conv(x)[:, :3].mean(1, keepdim=True)),
        conv=nn.Conv2d(3, 12, 1), last=nn.Conv2d(12, 2, 1),
    )  # fmt: skip
    before = traced(model)
    plan = dataclasses.replace(fxc.analyze(before, "select-channels"), removals=(
        Removal(0, "conv.weight:0", "whole", 12, (0, 1, 2), ("conv.weight:0",)),))  # fmt: skip

    with pytest.raises(InputError, match="nothing of a dim of slice"):
        plan.mask(before, before.analyze("channels"))


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "3", "null", "{}", '"plan"', "[" * 100_000,
        '{"format": 1}',
        '{"format": 1, "model": 5, "removals": [], "refusals": [], "source": "", "macs": null}',
        '{"format": 1, "model": "", "removals": {}, "refusals": [], "source": "", "macs": null}',
        '{"format": 1, "model": "", "removals": [3], "refusals": [], "source": "", "macs": null}',
        '{"format": 1, "model": "", "removals": [{}], "refusals": [], "source": "", "macs": null}',
        '{"format": 1, "model": "", "removals": [], "refusals": [{"code": 1}], "source": "", "macs": null}',
        '{"format": 1, "model": "", "removals": [], "refusals": [], "source": "", "macs": [1]}',
        '{"format": 1, "model": "", "removals": [], "refusals": [], "source": "", "macs": "ab"}',
    ],
)  # fmt: skip
def test_refuses_text_that_is_no_plan(text):
    with pytest.raises(InputError, match=r"this is no channel plan .*write one with ChannelPlan.to_json"):
        ChannelPlan.from_json(text)


@pytest.mark.parametrize(
    "change",
    [
        {"removed": "123"}, {"removed": [True]}, {"removed": [1.5]}, {"removed": ["1"]}, {"removed": None},
        {"members": "abc"}, {"members": [3]}, {"group": "0"}, {"size": None}, {"factor": "third"}, {"name": 3},
        {"more": 1}, {"more": "text"},
    ],
    ids=str,
)  # fmt: skip
def test_refuses_entries_of_other_types(plan, change):
    with pytest.raises(InputError, match="this is no channel plan"):
        edited(plan, **change)


def test_refuses_another_format(plan):
    with pytest.raises(InputError, match="the plan has format 2; this version reads 1"):
        ChannelPlan.from_json(plan.to_json().replace('"format": 1', '"format": 2'))
