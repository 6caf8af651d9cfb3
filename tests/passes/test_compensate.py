"""compensate: what stays takes up what goes."""

import copy

import pytest
import torch
from fxcompress.passes.channels.plan import ChannelPlan, Removal, digest
from fxcompress.passes.compensate import Compensate
from models import BERT_INPUTS, inputs, settled, small_bert, small_vit
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from fxcompress import InputError, PassManager, Task, analyze, trace
from fxcompress.verification.numerics import compare

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
CONV_TRANSPOSE = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def last_half(program, tmp_path, *names):
    """A file with a plan to remove the last half of the groups that start with these parameters."""
    removals = []
    for index, group in enumerate(analyze(program, "channels").groups):
        if not names or group.name in names:
            gone = tuple(range(len(group) // 2, len(group)))
            members = tuple(map(str, group.members))
            removals.append(Removal(index, group.name, group.factor, len(group), gone, members))
    assert removals
    path = tmp_path / "plan.json"
    path.write_text(ChannelPlan(digest(program), tuple(removals)).to_json())
    return str(path)


def slimmed(program, plan, task, **options):
    """The Program after removal with and without compensation, and what compensate says it did."""
    steps = f"remove-channels{{plan={plan}}}"
    done = PassManager([Compensate(plan=plan, **options)]).run(program, task)
    after = PassManager(steps).run(done.program).program
    return after, PassManager(steps).run(program).program, done.records[0].result


def error(before, after, x):
    with torch.no_grad():
        expected, found = before(x), after(x)
    return float((found - expected).square().sum() / expected.square().sum())


def doubled(layer, dim=0):
    """Makes the last half of a layer's outputs, within each group, twice the first half."""
    with torch.no_grad():
        half = layer.weight.shape[dim] // 2
        layer.weight.narrow(dim, half, half).copy_(2 * layer.weight.narrow(dim, 0, half))
        layer.bias[half:] = 2 * layer.bias[:half]
    return layer


# --- what is redundant goes without a trace --------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [{"padding": 1}, {"stride": 2, "bias": False}, {"padding": 2, "dilation": 2}, {"padding": "same", "dilation": 2}],
    ids=str,
)
def test_a_convolution_takes_up_inputs_that_depend_on_others(dims, options, tmp_path):
    model = nn.Sequential(CONV[dims](3, 8, 1), nn.ReLU(), CONV[dims](8, 5, 3, **options))
    check_nothing_is_lost(model, inputs(24, 3, *(9,) * dims), tmp_path)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1, "output_padding": 1}, {"dilation": 2}], ids=str)
def test_a_transposed_convolution_does_too(dims, options, tmp_path):
    model = nn.Sequential(CONV[dims](3, 8, 1), nn.ReLU(), CONV_TRANSPOSE[dims](8, 5, 3, **options))
    check_nothing_is_lost(model, inputs(24, 3, *(5,) * dims), tmp_path)


@pytest.mark.parametrize("shape", [(64, 6), (8, 7, 6), (4, 3, 5, 6)], ids=str)
def test_a_linear_layer_does_too(shape, tmp_path):
    check_nothing_is_lost(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)), inputs(*shape), tmp_path)


def test_layers_between_are_passed(tmp_path):
    depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), depthwise, nn.ReLU(), nn.Conv2d(8, 5, 3))
    settled(model)
    with torch.no_grad():
        depthwise.weight[4:] = depthwise.weight[:4]

    check_nothing_is_lost(model, inputs(8, 3, 7, 7), tmp_path, settle=False)


def check_nothing_is_lost(model, x, tmp_path, settle=True):
    model = settled(model) if settle else model
    doubled(model[0])
    before = trace(model, x)
    plan = last_half(before, tmp_path, "0.weight:0")

    after, plain, result = slimmed(before, plan, Task(calibration=[x]), penalty=0.0)

    fresh = inputs(*x.shape, seed=9)
    assert error(before, plain, fresh) > 1e-3
    assert error(before, after, fresh) < 1e-12
    assert result.statistics["% of error left"] < 1e-6


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_each_group_of_a_grouped_convolution_takes_up_its_own(kind, tmp_path):
    model = settled(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), kind(8, 6, 3, groups=2)))
    for half in (slice(0, 4), slice(4, 8)):
        doubled_part(model[0], half)
    x = inputs(8, 3, 6, 6)
    before = trace(model, x)

    after, plain, _ = slimmed(before, last_half(before, tmp_path, "0.weight:0"), Task(calibration=[x]), penalty=0.0)

    fresh = inputs(*x.shape, seed=9)
    assert after.graph_module.get_parameter("0.weight").shape[0] == 4
    assert error(before, plain, fresh) > 1e-3
    assert error(before, after, fresh) < 1e-12


def doubled_part(layer, part):
    """Within some outputs of a layer, makes the last half twice the first half."""
    with torch.no_grad():
        weight, bias = layer.weight[part], layer.bias[part]
        half = len(weight) // 2
        weight[half:], bias[half:] = 2 * weight[:half], 2 * bias[:half]


# --- the mean of what goes -------------------------------------------------------------------------------------------


def constant_last_half(layer):
    with torch.no_grad():
        half = len(layer.weight) // 2
        layer.weight[half:] = 0
        layer.bias[half:] = 0.5


@pytest.mark.parametrize("bias", [True, False])
def test_a_constant_moves_into_the_bias_or_the_batch_norm_after(bias, tmp_path):
    tail = [] if bias else [nn.BatchNorm2d(5)]
    model = settled(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 5, 3, bias=bias), *tail, nn.ReLU()))
    constant_last_half(model[0])
    x = inputs(4, 3, 6, 6)
    before = trace(model, x)

    after, plain, _ = slimmed(before, last_half(before, tmp_path, "0.weight:0"), Task(calibration=[x]), penalty=1.0)

    assert error(before, plain, x) > 1e-3
    assert error(before, after, x) < 1e-18
    assert sorted(after.graph_module.state_dict()) == sorted(before.graph_module.state_dict())


def test_no_bias_is_added_where_nothing_takes_a_shift_up(tmp_path):
    model = settled(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 5, bias=False), nn.ReLU()))
    constant_last_half(model[0])
    x = inputs(64, 3)
    before = trace(model, x)

    after, plain, _ = slimmed(before, last_half(before, tmp_path, "0.weight:0"), Task(calibration=[x]))

    assert sorted(after.graph_module.state_dict()) == ["0.bias", "0.weight", "2.weight"]
    assert error(before, after, x) < 0.5 * error(before, plain, x)


# --- whole models ----------------------------------------------------------------------------------------------------


class Functional(nn.Module):
    """Calls layers by function."""

    def __init__(self):
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(8, 3, 3, 3)), nn.Parameter(torch.randn(5, 8, 3, 3))
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("variance", torch.ones(5))

    def forward(self, x):
        return F.batch_norm(F.conv2d(F.conv2d(x, self.w1).relu(), self.w2), self.mean, self.variance)


class Modules(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 5, 3, bias=False)
        self.norm = nn.BatchNorm2d(5, affine=False)

    def forward(self, x):
        return self.norm(self.conv2(self.conv1(x).relu()))


def test_calls_by_function_are_refitted_like_modules(tmp_path):
    modules, functional = settled(Modules()), settled(Functional())
    modules.norm.running_mean.zero_()
    modules.norm.running_var.fill_(1)
    modules.conv1.weight, modules.conv2.weight = functional.w1, functional.w2
    x = inputs(8, 3, 9, 9)
    found = []
    for model, name in ((modules, "conv1.weight:0"), (functional, "w1:0")):
        before = trace(model, x)
        after, plain, _ = slimmed(before, last_half(before, tmp_path, name), Task(calibration=[x]), penalty=0.01)
        assert error(before, after, x) < error(before, plain, x)
        found.append(after(x))

    torch.testing.assert_close(found[0], found[1])


def small_resnet():
    from fxcompress.digits import ResidualBlock

    return nn.Sequential(ResidualBlock(3, 8, 1), ResidualBlock(8, 12, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize(
    ("model", "shape"), [(small_resnet, (32, 3, 8, 8)), (small_vit, (12, 3, 32, 32))], ids=["resnet", "vit"]
)
def test_brings_the_outputs_of_whole_models_closer(model, shape):
    torch.manual_seed(0)
    x, fresh = inputs(2, *shape), inputs(*shape, seed=9)
    before = trace(model().double().eval(), x[0])
    task = Task(calibration=list(x))

    plain = PassManager("select-channels{ratio=0.25},remove-channels").run(before, task).program
    done = PassManager("select-channels{ratio=0.25},compensate,remove-channels").run(before, task)

    assert error(before, done.program, fresh) < 0.7 * error(before, plain, fresh)
    assert done.records[1].comparison.sqnr_db > 0
    assert not done.records[1].result.refusals


def test_inputs_by_name_and_integer_inputs():
    example, dynamic = BERT_INPUTS
    before = trace(small_bert().eval(), example, dynamic=dynamic)
    task = Task(calibration=[example], inputs=lambda batch: batch)

    done = PassManager("select-channels{ratio=0.5},compensate,remove-channels").run(before, task)

    assert done.records[1].result.statistics["refitted"] == 4  # of the attention, two of the MLP, the pooler


def test_errors_do_not_pile_up():
    """Fitted on the values that fitted layers leave, a later layer corrects what the layers before it got wrong."""
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(16, 16), nn.ReLU())), nn.Linear(16, 4))
    x = inputs(2000, 16)
    before = trace(model.double(), x)
    done = PassManager("select-channels{ratio=0.25 criterion=l2},compensate").run(before, Task(calibration=[x]))

    slim = done.program.graph_module
    alone = copy.deepcopy(slim)
    alone.get_submodule("8").load_state_dict(before.graph_module.get_submodule("8").state_dict())
    expected = before(x)

    assert (slim(x)[0] - expected).norm() < 0.95 * (alone(x)[0] - expected).norm()


# --- what is refused, and what is wrong ------------------------------------------------------------------------------


class TiedReaders(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 5), nn.Linear(8, 5)
        self.b.weight = self.a.weight

    def forward(self, x):
        x = self.first(x).relu()
        return self.a(x) * self.b(x.square())


def test_refuses_a_weight_that_another_call_reads(tmp_path):
    check_refuses(TiedReaders(), "first.weight:0", ["shared-weight", "shared-weight"], tmp_path)


def test_refuses_a_weight_that_is_computed(tmp_path):
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), parametrizations.weight_norm(nn.Linear(8, 5)))
    check_refuses(model, "0.weight:0", ["computed-weight"], tmp_path)


def test_refuses_activations_that_are_not_finite(tmp_path):
    class Overflows(nn.Sequential):
        def forward(self, x):
            return self[1](self[0](x).exp() - 1)

    check_refuses(Overflows(nn.Linear(3, 8), nn.Linear(8, 5)), "0.weight:0", ["not-finite"], tmp_path, scale=1e6)


def check_refuses(model, name, codes, tmp_path, scale=1.0):
    x = inputs(16, 3)
    before = trace(settled(model), x)
    plan = last_half(before, tmp_path, name)

    done = PassManager([Compensate(plan=plan)], instruments=[]).run(before, Task(calibration=[scale * x]))

    assert [refusal.code for refusal in done.records[0].result.refusals] == codes
    assert not done.records[0].result.changed


def test_nothing_planned_changes_nothing():
    x = inputs(4, 3)
    done = PassManager("select-channels{ratio=0},compensate").run(trace(settled(nn.Linear(3, 3)), x))

    assert not done.records[1].result.changed


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (None, "compensate needs calibration batches"),
        (Task(loss=lambda outputs, batch: outputs.sum()), "compensate needs calibration batches"),
        (Task(calibration=[[]], inputs=lambda batch: {"y": torch.ones(2, 3)}), "traced with"),
    ],
    ids=["no task", "no batches", "other inputs"],
)
def test_says_what_calibration_is_needed(task, message):
    model = settled(nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 3)))
    before = trace(model, inputs(4, 3))

    with pytest.raises(InputError, match=message):
        PassManager("select-channels{criterion=l2},compensate").run(before, task)


def test_needs_a_plan():
    before = trace(settled(nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 3))), inputs(4, 3))

    with pytest.raises(InputError, match="put select-channels before it"):
        PassManager("compensate").run(before, Task(calibration=[inputs(4, 3)]))


def test_says_that_the_meta_device_has_no_activations():
    model = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 3)).to("meta")
    before = trace(model, torch.empty(4, 3, device="meta"))

    with pytest.raises(InputError, match="meta device"):
        PassManager("select-channels{criterion=random},compensate").run(before, Task(calibration=[inputs(4, 3)]))


@pytest.mark.parametrize("options", [{"batches": 0}, {"places": 1}, {"penalty": -1.0}], ids=str)
def test_refuses_options_out_of_range(options):
    with pytest.raises(InputError):
        Compensate(**options)


def test_the_model_and_the_program_before_keep_their_weights():
    model = settled(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3)))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = inputs(64, 3)
    before = trace(model, x)
    text = before.text()

    after = PassManager("select-channels{criterion=l2},compensate").run(before, Task(calibration=[x])).program

    assert compare(before, after).sqnr_db < 200
    assert before.text() == text
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=0)


def test_keeps_dtype_and_what_is_trained():
    model = settled(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3))).to(torch.bfloat16)
    model[2].weight.requires_grad_(False)
    x = inputs(64, 3).to(torch.bfloat16)

    after = (
        PassManager("select-channels{criterion=l2},compensate,remove-channels")
        .run(trace(model, x), Task(calibration=[x]))
        .program
    )

    new = after.graph_module.get_submodule("2")
    assert (new.weight.dtype, new.weight.requires_grad, new.bias.requires_grad) == (torch.bfloat16, False, True)
