"""Bad input gives one clear error, and the caller's model stays as it was, whatever happens."""

import math

import pytest
import torch
from torch import nn

import fxcompress as fxc


class Net(nn.Module):
    """Batch norm, dropout, a shared layer, a hook and a mode that differs inside."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 2)
        self.alias = self.head
        self.last_shape = None

    def forward(self, x):
        y = self.drop(self.norm(self.conv(x)).relu())
        self.last_shape = tuple(x.shape)
        return self.head(y.mean((2, 3)))


def snapshot(model):
    return {
        path: (
            module.training,
            {name: (id(t), t._version, t.clone()) for name, t in module._parameters.items() if t is not None},
            {name: (id(t), t._version, t.clone()) for name, t in module._buffers.items() if t is not None},
            {name: id(child) for name, child in module._modules.items()},
            list(module._forward_hooks), list(module._forward_pre_hooks), list(module._backward_hooks),
            getattr(module, "last_shape", None),
        )
        for path, module in model.named_modules(remove_duplicate=False)
    }  # fmt: skip


def assert_untouched(model, before):
    after = snapshot(model)
    assert after.keys() == before.keys()
    for path, (training, parameters, buffers, *rest) in after.items():
        mode, old_parameters, old_buffers, *old_rest = before[path]
        assert training == mode, path
        assert rest == old_rest, path
        for new, old in ((parameters, old_parameters), (buffers, old_buffers)):
            assert new.keys() == old.keys()
            for name, (identity, version, value) in new.items():
                assert (identity, version) == old[name][:2], f"{path}.{name}"
                assert torch.equal(value, old[name][2]) or torch.isnan(value).any(), f"{path}.{name}"


@pytest.fixture
def model():
    net = Net().train()
    net.norm.eval()
    net.conv.register_forward_hook(lambda *_: None)
    return net


GOOD = (2, 3, 8, 8)


def test_success_leaves_the_model_alone(model):
    before = snapshot(model)
    program = fxc.trace(model, torch.randn(GOOD))
    assert_untouched(model, before)
    emitted = program.emit().train()
    emitted(torch.randn(GOOD)).sum().backward()
    torch.optim.SGD(emitted.parameters(), 0.1).step()
    assert_untouched(model, before)
    assert all(parameter.grad is None for parameter in model.parameters())


def poisoned(value):
    def poison(model):
        with torch.no_grad():
            model.head.bias[0] = value

    return poison


def nothing(model):
    pass


def norm_without_variance(model):
    model.norm.running_var.fill_(-1.0)


def overflow(model):
    model.conv.register_forward_hook(lambda module, args, out: (out.abs() + 1) * 1e38 * 1e38)


def control_flow(model):
    model.conv.register_forward_hook(lambda module, args, out: out * 2 if out.sum() > 0 else out)


INPUT, CAPTURE = fxc.InputError, fxc.CaptureError

BAD_INPUTS = {
    "shape": (nothing, lambda: torch.randn(2, 5, 8, 8), INPUT, "fails on the example inputs.*x: torch.float32"),
    "rank": (nothing, lambda: torch.randn(8), INPUT, "fails on the example inputs"),
    "dtype": (nothing, lambda: torch.ones(GOOD, dtype=torch.int64), INPUT, "fails on the example inputs.*int64"),
    "device": (nothing, lambda: torch.randn(GOOD, device="meta"), INPUT, "'x' is on meta, but the model is on cpu"),
    "too many": (nothing, lambda: (torch.randn(GOOD), torch.randn(2)), INPUT, "do not fit Net.forward.*too many"),
    "keyword": (nothing, lambda: {"image": torch.randn(GOOD)}, INPUT, "do not fit Net.forward"),
    "no tensor": (nothing, lambda: "an image", INPUT, "hold no tensor"),
    "none": (nothing, lambda: None, INPUT, "hold no tensor"),
    "empty batch": (nothing, lambda: torch.randn(0, 3, 8, 8), INPUT, "'x' is empty"),
    "nan input": (nothing, lambda: torch.full(GOOD, math.nan), INPUT, "'x' holds NaN"),
    "nan weight": (poisoned(math.nan), lambda: torch.randn(GOOD), INPUT, "'head.bias' holds NaN or Inf"),
    "inf weight": (poisoned(math.inf), lambda: torch.randn(GOOD), INPUT, "'head.bias' holds NaN or Inf"),
    "nan output": (norm_without_variance, lambda: torch.randn(GOOD), INPUT, "gives NaN"),
    "inf output": (overflow, lambda: torch.randn(GOOD), INPUT, "gives (NaN|Inf)"),
    "control flow": (control_flow, lambda: torch.randn(GOOD), CAPTURE, "trace_islands"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input_gives_a_clear_error_and_leaves_the_model_alone(model, case):
    spoil, inputs, error, message = case
    spoil(model)
    before = snapshot(model)
    with pytest.raises(error, match=f"(?s){message}"):
        fxc.trace(model, inputs())
    assert_untouched(model, before)


def test_a_value_that_is_no_model():
    with pytest.raises(fxc.InputError, match=r"needs a torch\.nn\.Module"):
        fxc.trace(lambda x: x, torch.randn(2))


@pytest.mark.parametrize(
    ("dynamic", "message"), [({"image": (2,)}, "'image', which does not exist; inputs: x"), ({"x": (7,)}, "dim 7")]
)
def test_dynamic_dims_that_do_not_exist(model, dynamic, message):
    with pytest.raises(fxc.InputError, match=message):
        fxc.trace(model, torch.randn(GOOD), dynamic=dynamic)


@pytest.mark.parametrize("stage", ["run_model", "export", "lower", "_verify"])
def test_an_interruption_at_any_stage_leaves_the_model_alone(model, stage, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"fxcompress.tracing.tracer.{stage}", interrupt)
    before = snapshot(model)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(KeyboardInterrupt):
        fxc.trace(model, torch.randn(GOOD))
    assert_untouched(model, before)
    assert torch.backends.mha.get_fastpath_enabled() == fast_path


def test_random_state_is_the_caller_s():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    state = torch.get_rng_state()
    fxc.trace(model, torch.ones(2, 3))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_call_of_another_structure_is_refused():
    program = fxc.trace(nn.Linear(3, 3), torch.randn(2, 3))
    with pytest.raises(fxc.InputError, match="inputs: input"):
        program(torch.randn(2, 3), torch.randn(2, 3))
