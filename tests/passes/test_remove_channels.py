"""remove-channels: plans in, slim models out; what it refuses, what it leaves alone, and what must stay shared."""

import json

import pytest
import torch
from fxcompress.passes.channels import removal
from fxcompress.passes.channels.plan import ChannelPlan, Removal, digest
from fxcompress.passes.remove_channels import RemoveChannels
from models import inputs, residual_net, settled
from pruning import Wire, check_trains, prune, shapes
from torch import nn

import fxcompress as fxc
from fxcompress.errors import InputError, VerificationError

HALF = "select-channels{ratio=0.5},remove-channels"
IMAGE = inputs(2, 3, 8, 8)


def small():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(1), nn.Linear(288, 5))


def traced(model=None, x=IMAGE, **options):
    return fxc.trace(settled(model or small()), x, **options)


def plan_of(program, removed):
    """A plan that removes units by their places, by number of the group."""
    groups = program.analyze("channels").groups
    return ChannelPlan(
        digest(program),
        tuple(
            Removal(index, groups[index].name, groups[index].factor, len(groups[index]), tuple(places), ())
            for index, places in removed.items()
        ),
    )


def apply(plan, program, folder):
    path = folder / "plan.json"
    path.write_text(plan.to_json())
    return fxc.PassManager([RemoveChannels(plan=str(path))]).run(program)


# --- what it does ----------------------------------------------------------------------------------------------------


def test_takes_out_what_the_plan_names(tmp_path):
    before = traced()

    done = apply(plan_of(before, {0: [1, 2, 7]}), before, tmp_path)

    old, new = (program.graph_module.get_submodule("0") for program in (before, done.program))
    torch.testing.assert_close(new.weight, old.weight[[0, 3, 4, 5, 6]], rtol=0, atol=0)
    torch.testing.assert_close(new.bias, old.bias[[0, 3, 4, 5, 6]], rtol=0, atol=0)
    assert (new.out_channels, new.in_channels) == (5, 3)
    assert done.records[0].result.statistics["removed"] == 3
    kept = old.weight.new_zeros(8, dtype=torch.bool)
    kept[[0, 3, 4, 5, 6]] = True
    head = before.graph_module.get_parameter("4.weight")[:, kept.repeat_interleave(36)]
    torch.testing.assert_close(done.program.graph_module.get_parameter("4.weight"), head, rtol=0, atol=0)


def test_rewrites_what_follows_from_sizes(golden):
    def forward(m, x):
        x = nn.functional.channel_shuffle(m.stem(x), 2).flatten(2).transpose(1, 2)
        query, key, value = m.qkv(x).reshape(*x.shape[:2], 3, 4, 6).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + m.out(nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        left, right = m.norm(x).split(8, -1)
        return m.head(nn.functional.pad(left[..., ::2] * right[..., 4:], (2, 2)))

    model = Wire(
        forward, stem=nn.Conv2d(3, 16, 4, 4), qkv=nn.Linear(16, 72), out=nn.Linear(24, 16), norm=nn.LayerNorm(16),
        head=nn.Linear(8, 2),
    )  # fmt: skip

    golden("remove-channels-literals", prune(model, IMAGE).text())


def test_a_plan_from_a_file_does_what_the_selection_does(tmp_path):
    before = traced(residual_net())
    selected = fxc.PassManager(HALF).run(before)

    done = apply(selected.records[0].value, traced(residual_net()), tmp_path)

    assert done.program.text() == selected.program.text()
    for name, tensor in done.program.graph_module.state_dict().items():
        assert torch.equal(tensor, selected.program.graph_module.state_dict()[name]), name


def test_removal_goes_on_from_where_it_stopped():
    once = fxc.PassManager(HALF).run(traced())
    twice = fxc.PassManager(HALF).run(once.program)
    both = fxc.PassManager(f"{HALF},{HALF}").run(traced())

    assert shapes(once.program)["0"] == (4, 3, 3, 3)
    assert shapes(twice.program)["0"] == shapes(both.program)["0"] == (2, 3, 3, 3)


def test_lookups_that_removal_made_can_lose_more():
    def forward(m, x):
        return m.head(nn.functional.channel_shuffle(m.stem(x), 4)[:, ::2])

    model = Wire(forward, stem=nn.Conv2d(3, 32, 1), head=nn.Conv2d(16, 2, 1))
    twice = fxc.PassManager(f"{HALF},{HALF}").run(traced(model)).program

    assert shapes(twice) == {"stem": (8, 3, 1, 1), "head": (2, 4, 1, 1)}


@pytest.mark.parametrize("removed", [{}, {0: []}])
def test_nothing_to_remove_changes_nothing(tmp_path, removed):
    before = traced()

    done = apply(plan_of(before, removed), before, tmp_path)

    assert not done.records[0].result.changed
    assert done.program.text() == before.text()
    assert done.program.graph_module.get_parameter("0.weight") is before.graph_module.get_parameter("0.weight")


def test_one_unit_of_each_group_may_be_all_that_stays():
    after = prune(residual_net(), IMAGE, ratio=0.99)

    assert {shape[0] for name, shape in shapes(after).items() if name != "4"} == {1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions_are_checked_in_float64(dtype):
    model = settled(small()).to(dtype)
    before = fxc.trace(model, IMAGE.to(dtype))

    after = fxc.PassManager(HALF).run(before).program

    assert {parameter.dtype for parameter in after.graph_module.parameters()} == {dtype}
    check_trains(after, [IMAGE.to(dtype)])


def test_works_on_the_meta_device(tmp_path):
    before = fxc.trace(small().to("meta").eval(), torch.empty(2, 3, 8, 8, device="meta"))

    done = apply(plan_of(before, {0: [0, 1, 2, 3]}), before, tmp_path)

    assert shapes(done.program) == {"0": (4, 3, 3, 3), "4": (5, 144)}
    assert done.program.graph_module.get_parameter("0.weight").is_meta


def test_keeps_what_is_trained_and_what_is_saved():
    model = settled(small())
    model[0].weight.requires_grad_(False)
    before = fxc.trace(model, IMAGE)

    after = fxc.PassManager(HALF).run(before).program.emit()

    assert list(after.state_dict()) == list(model.state_dict())
    assert [p.requires_grad for p in after.parameters()] == [p.requires_grad for p in model.parameters()]


def test_the_slim_model_is_saved_loaded_and_reported(tmp_path):
    def forward(m, x):
        x = m.stem(x)
        return m.head(nn.functional.channel_shuffle(x, 4)[:, ::2])

    model = Wire(forward, stem=nn.Conv2d(3, 16, 1), head=nn.Conv2d(8, 2, 1))
    out = fxc.compress(settled(model), IMAGE, HALF)
    out.save(tmp_path / "slim.pt2")
    loaded = fxc.load(tmp_path / "slim.pt2")

    torch.testing.assert_close(loaded.emit()(IMAGE), out.model(IMAGE), rtol=0, atol=0)
    assert "8" in out.report.table()


# --- what is shared stays shared -------------------------------------------------------------------------------------


def test_a_layer_called_twice_loses_the_same_channels_at_both_calls():
    def forward(m, x):
        x = m.stem(x)
        return m.head(m.body(m.body(x).relu()))

    model = Wire(forward, stem=nn.Conv2d(3, 8, 1), body=nn.Conv2d(8, 8, 3, padding=1), head=nn.Conv2d(8, 2, 1))
    after = prune(model, IMAGE)

    assert shapes(after) == {"stem": (4, 3, 1, 1), "body": (4, 4, 3, 3), "head": (2, 4, 1, 1)}
    assert [node.target for node in after.nodes if node.op == "call_module"] == ["stem", "body", "body", "head"]


def test_layers_that_share_a_weight_lose_the_same_channels():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(16, 2)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.head(torch.cat([self.a(x), self.b(x)], -1))

    after = prune(Shared(), inputs(3, 6))

    root = after.graph_module
    assert root.get_parameter("a.weight") is root.get_parameter("b.weight")
    assert root.get_parameter("a.weight").shape == (4, 6)
    assert (len(root.get_parameter("a.bias")), len(root.get_parameter("b.bias"))) == (4, 4)


def test_a_weight_used_as_its_own_transpose():
    def forward(m, x):
        hidden = nn.functional.linear(x, m.weight, m.inner).relu()
        return nn.functional.linear(hidden, m.weight.t(), m.outer)

    model = Wire(forward, weight=nn.Parameter(torch.zeros(8, 6)), inner=nn.Parameter(torch.zeros(8)),
                 outer=nn.Parameter(torch.zeros(6)))  # fmt: skip
    after = prune(model, inputs(3, 6))

    assert shapes(after) == {"weight": (4, 6)} or after.graph_module.get_parameter("weight").shape == (4, 6)


# --- what is left alone ----------------------------------------------------------------------------------------------


def test_the_callers_model_and_the_program_before_stay_as_they_are():
    model = settled(residual_net())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = str(model)
    before = fxc.trace(model, IMAGE)
    text, expected = before.text(), before(IMAGE)

    fxc.PassManager(HALF).run(before)

    assert str(model) == attributes
    assert before.text() == text
    assert torch.equal(before(IMAGE), expected)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_inputs_and_outputs_keep_their_shapes():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, x, scale):
            hidden = self.body(x)
            return {"scaled": hidden * scale, "answer": self.head(hidden)}

    before = fxc.trace(settled(Branches()), (inputs(3, 6), inputs(3, 8)))

    assert before.analyze("channels").groups == ()


# --- refusals --------------------------------------------------------------------------------------------------------


def refuses(program, pipeline, message, error=InputError):
    text, state = program.text(), dict(program.graph_module.state_dict())
    with pytest.raises(error, match=message):
        fxc.PassManager(pipeline).run(program)
    assert program.text() == text
    assert all(tensor is state[name] or torch.equal(tensor, state[name]) for name, tensor in state.items())


def test_needs_a_plan():
    refuses(traced(), "remove-channels", "needs a plan: put select-channels before it, or give plan=FILE.json")


def test_a_plan_is_used_once():
    refuses(traced(), f"{HALF},remove-channels", "needs a plan")


def test_refuses_a_plan_for_another_model(tmp_path):
    other = fxc.PassManager("select-channels").run(traced(residual_net())).records[0].value
    (tmp_path / "plan.json").write_text(other.to_json())

    refuses(traced(), [RemoveChannels(plan=str(tmp_path / "plan.json"))], "for another model.*run select-channels")


def test_a_plan_fits_a_model_with_other_weights(tmp_path):
    plan = fxc.PassManager("select-channels").run(traced()).records[0].value
    trained = settled(small(), seed=7)

    done = apply(plan, fxc.trace(trained, IMAGE), tmp_path)

    assert shapes(done.program)["0"] == (4, 3, 3, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "no channel plan"),
        ("[]", "no channel plan"),
        ("{}", "no channel plan"),
        ('{"format": 99}', "format 99"),
        ('{"format": 1, "model": "x", "removals": [{}], "notes": []}', "no channel plan"),
    ],
)
def test_refuses_a_file_that_is_no_plan(tmp_path, text, message):
    (tmp_path / "plan.json").write_text(text)

    refuses(traced(), [RemoveChannels(plan=str(tmp_path / "plan.json"))], message)


def test_refuses_a_file_that_is_not_there(tmp_path):
    refuses(traced(), [RemoveChannels(plan=str(tmp_path / "none.json"))], "cannot be read")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group": 5}, r"group 5 .*the model has 1 groups"),
        ({"group": -1}, "group -1"),
        ({"removed": [8]}, "removes unit 8 of group 0.weight:0, which has units 0 to 7"),
        ({"removed": [-1]}, "removes unit -1"),
        ({"removed": list(range(8))}, "all 8 units of group 0.weight:0; leave at least one"),
    ],
)
def test_refuses_a_plan_that_the_groups_do_not_fit(tmp_path, change, message):
    program = traced()
    data = json.loads(plan_of(program, {0: [0]}).to_json())
    data["removals"][0].update(change)
    (tmp_path / "plan.json").write_text(json.dumps(data))

    refuses(program, [RemoveChannels(plan=str(tmp_path / "plan.json"))], message)


def test_a_wrong_slice_leaves_the_program_as_it_was(monkeypatch):
    right = removal.sliced

    def backwards(tensor, places, buffer):
        sizes = zip(tensor.shape, places, strict=True)
        return right(tensor, [None if kept is None else size - 1 - kept.flip(0) for size, kept in sizes], buffer)

    monkeypatch.setattr(removal, "sliced", backwards)

    refuses(traced(), HALF, "removal must leave what the masked model computes", VerificationError)
