"""State that a forward writes, leaks or reads in unusual ways: restored, refused by name, or captured right."""

import pytest
import torch
from torch import nn

import fxcompress as fxc


class Model(nn.Module):
    """A linear layer, tensors as buffers, and a forward given as a function."""

    def __init__(self, function, **attributes):
        super().__init__()
        self.function = function
        self.linear = nn.Linear(4, 4)
        for name, value in attributes.items():
            if isinstance(value, torch.Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x):
        return self.function(self, x)


def count_calls(self, x):
    self.calls.add_(1)
    return self.linear(x) + self.calls


def clamp_weight(self, x):
    with torch.no_grad():
        self.linear.weight.clamp_(-0.1, 0.1)
    return self.linear(x)


def clamp_weight_data(self, x):
    self.linear.weight.data.clamp_(-0.1, 0.1)
    return self.linear(x)


def update_statistics(self, x):
    self.norm.train()
    return self.norm(self.linear(x))


@pytest.mark.parametrize(
    ("function", "attributes", "named"),
    [
        (count_calls, {"calls": torch.zeros(1)}, "calls"),
        (clamp_weight, {}, "linear.weight"),
        (clamp_weight_data, {}, "linear.weight"),
        (update_statistics, {"norm": nn.BatchNorm1d(4)}, "norm.running_mean"),
    ],
)
def test_state_written_in_forward_is_named_and_put_back(function, attributes, named):
    model = Model(function, **attributes)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(fxc.CaptureError, match=rf"own state.*{named}.*pass the state as an input"):
        fxc.trace(model, torch.randn(2, 4))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_an_output_that_depends_on_a_python_counter_is_refused_by_name():
    def forward(self, x):
        self.step = self.step + 1
        return self.linear(x) + self.step

    model = Model(forward, step=0)
    with pytest.raises(fxc.CaptureError, match=r"changes its own attributes in forward \(step\)"):
        fxc.trace(model, torch.randn(2, 4))
    assert model.step == 0


def test_containers_of_a_module_hold_afterwards_what_they_held_before():
    def forward(self, x):
        y = self.linear(x)
        self.log.append(y)
        self.table["seen"]["last"] = y
        self.names.add("y")
        return y

    model = Model(forward, log=["kept"], table={"seen": {}}, names=set())
    fxc.trace(model, torch.randn(2, 4))
    assert model.log == ["kept"]
    assert model.table == {"seen": {}}
    assert model.names == set()


def test_interrupting_the_forward_leaves_everything_as_it_was():
    def forward(self, x):
        self.calls.add_(1)
        self.log.append(x)
        self.cached = x
        raise KeyboardInterrupt

    model = Model(forward, calls=torch.zeros(1), log=[]).train()
    with pytest.raises(KeyboardInterrupt):
        fxc.trace(model, torch.randn(2, 4))
    assert model.calls.item() == 0
    assert model.log == []
    assert not hasattr(model, "cached")
    assert model.training
    assert not model._forward_hooks


def test_interrupting_the_export_leaves_no_fake_tensor_behind():
    def forward(self, x):
        self.cached = self.linear(x)
        self.log.append(self.cached)
        if isinstance(self.cached, torch._subclasses.FakeTensor) or type(x) is not torch.Tensor:
            raise KeyboardInterrupt
        return self.cached

    model = Model(forward, log=[])
    with pytest.raises(KeyboardInterrupt):
        fxc.trace(model, torch.randn(2, 4))
    assert model.log == []
    assert not hasattr(model, "cached")


def test_unsaved_buffers_whose_names_clash_when_flattened_stay_apart():
    class Holder(nn.Module):
        def __init__(self, name, value):
            super().__init__()
            self.register_buffer(name, torch.full((4,), value), persistent=False)

    model = Model(lambda self, x: self.linear(x) * self.a_b.c + self.a.b_c, a_b=Holder("c", 2.0), a=Holder("b_c", 5.0))
    x = torch.randn(2, 4)
    assert torch.equal(fxc.trace(model, x).emit()(x), model(x))


def test_a_buffer_that_forward_replaces_is_named():
    def forward(self, x):
        self.constants.running_mean = self.constants.running_mean + 1
        return self.linear(x) + self.constants.running_mean

    with pytest.raises(fxc.CaptureError, match=r"changes its own attributes in forward \(constants.running_mean\)"):
        fxc.trace(Model(forward, constants=nn.BatchNorm1d(4)), torch.randn(2, 4))


def test_random_numbers_in_eval_mode_are_listed_with_their_place():
    program = fxc.trace(Model(lambda self, x: self.linear(x) + torch.rand(4)), torch.randn(2, 4))
    (found,) = [d for d in program.diagnostics if d.code == "random"]
    assert "aten.rand.default draws random numbers" in found.message
    assert "test_tracing_state.py" in found.message


def test_dropout_and_attention_without_dropout_are_not_random():
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Dropout(0.1))
    program = fxc.trace(model, torch.randn(2, 5, 8))
    assert not [d for d in program.diagnostics if d.code == "random"]


def test_a_module_with_its_own_train_method_is_listed():
    class Frozen(nn.BatchNorm2d):
        def train(self, mode=True):
            return super().train(False)

    program = fxc.trace(nn.Sequential(Frozen(3)), torch.randn(2, 3, 4, 4))
    (found,) = [d for d in program.diagnostics if d.code == "training-only"]
    assert found.path == "0"


def test_a_hook_that_reads_training_is_listed():
    program = fxc.trace(nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 4))), torch.randn(2, 4))
    assert [d.path for d in program.diagnostics if d.code == "training-only"] == ["0"]


@pytest.mark.parametrize(
    ("model", "remedy"),
    [
        (torch.jit.script(nn.Linear(4, 4)), "the model is a TorchScript module"),
        (nn.Sequential(torch.jit.script(nn.Linear(4, 4))), "0 is a TorchScript module"),
        (nn.Sequential(nn.LazyLinear(3)), "run the model once before tracing"),
    ],
)
def test_modules_that_cannot_be_read_are_named(model, remedy):
    with pytest.raises(fxc.InputError, match=remedy):
        fxc.trace(model, torch.randn(2, 4))
    assert model.training


def test_a_value_cached_by_a_forward_is_computed_in_the_graph():
    """A bias that is cached on first use must stay computed from its parameter, which would else be left out."""

    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(4))
            self.cache = {}

        def forward(self, x):
            if "bias" not in self.cache:
                self.cache["bias"] = self.table * 2
            return x + self.cache["bias"]

    model = Cached().eval()
    program = fxc.trace(model, torch.randn(2, 4))
    assert set(program.graph_module.state_dict()) == {"table"}
    assert model.cache == {}
    x = torch.randn(3, 4)
    assert torch.equal(program(x), model(x))


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14),
    reason="torch.export of 2.13 fails on torch.cond itself",
)
def test_a_control_flow_operator_is_named():
    model = Model(lambda self, x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)))
    with pytest.raises(fxc.CaptureError, match=r"uses cond, a control-flow operator"):
        fxc.trace(model, torch.randn(2, 4))


def test_overflow_is_refused_and_masked_scores_are_not():
    with pytest.raises(fxc.InputError, match="gives Inf for the example inputs"):
        fxc.trace(Model(lambda self, x: (x.abs() + 1) * 1e38 * 1e38), torch.randn(2, 4))
    fxc.trace(Model(lambda self, x: x.masked_fill(x > 0, -torch.inf)), torch.randn(2, 4))
