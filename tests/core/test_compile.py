import importlib
import shutil
import sys
import time

import pytest
import torch
from installed import needs
from torch import nn
from toys import toy_program

import fxcompress as fxc
from fxcompress.engines import inductor
from fxcompress.engines.bench import bench
from fxcompress.engines.latency import Latency

compile_module = importlib.import_module("fxcompress.engines.compile")


class TwoWays(nn.Module):
    """Two inputs, and a structured output."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x, scale):
        y = self.linear(x) * scale
        return {"sum": y.sum(1), "all": (y, y.relu())}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return TwoWays().eval()


@pytest.fixture(scope="module")
def program(model):
    return fxc.trace(model, {"x": torch.randn(2, 6), "scale": torch.rand(2, 4)})


@pytest.mark.parametrize("engine", ["eager", "onnxruntime", "openvino", needs("executorch", "executorch")])
def test_it_is_called_as_the_model_is_and_gives_what_the_model_gives(program, model, engine):
    fast = fxc.compile(program, engine)
    x, scale = torch.randn(5, 6), torch.rand(5, 4)
    with torch.no_grad():
        expected = model(x=x, scale=scale)
    torch.testing.assert_close(fast(x=x, scale=scale), expected, rtol=1e-4, atol=1e-5)
    assert not fast(x=x, scale=scale)["sum"].requires_grad
    assert fast.size > 0


def test_inductor_shares_the_signature(program, model, monkeypatch):
    # Inductor needs a C++ compiler, so that what is checked here is what it is handed.
    backends = []

    def compile_(module, *, backend):
        backends.append(backend)
        return module

    monkeypatch.setattr(torch, "compile", compile_)
    x, scale = torch.randn(5, 6), torch.rand(5, 4)
    torch.testing.assert_close(fxc.compile(program, "inductor")(x=x, scale=scale)["sum"], model(x, scale)["sum"])
    assert backends == ["inductor"]


def convolutional():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(),
                          nn.Linear(72, 5)).eval()  # fmt: skip
    batches = list(torch.randn(4, 4, 3, 12, 12, generator=torch.Generator().manual_seed(1)))
    program = fxc.trace(model, batches[0])
    done = fxc.PassManager("insert-qdq{target=x86}").run(program, fxc.Task(calibration=batches))
    assert done.records[0].statistics["layers"] == 3
    return done.program, batches[0]


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("package", [needs("torchao", "torchao")])
def test_inductor_runs_quantized_layers_in_integers(package):
    program, x = convolutional()
    counters = importlib.import_module("torch._dynamo.utils").counters
    counters.clear()
    fast = fxc.compile(program, "inductor")
    found = counters["inductor"]
    assert found["qconv_unary_lower_count"] + found["qlinear_unary_lower_count"] == 3
    for given in (x, torch.cat([x, x])[:7]):
        expected = program(given)
        noise = (fast(given) - expected).square().sum() / expected.square().sum()
        assert noise < 1e-3


def test_inductor_needs_torchao_for_a_quantized_model(monkeypatch):
    monkeypatch.setitem(sys.modules, inductor._PATTERNS, None)
    with pytest.raises(fxc.MissingExtraError, match=r'pip install "fxcompress\[inductor\]"'):
        fxc.compile(convolutional()[0], "inductor")


def test_inductor_is_checked(program, model, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module, *, backend: lambda **kwargs: {
        "sum": module(**kwargs)["sum"] * 1.01, "all": module(**kwargs)["all"]
    })  # fmt: skip
    with pytest.raises(fxc.VerificationError, match=r"what inductor compiled differs from the model by 1.0\de-02"):
        fxc.compile(program, "inductor")

    def broken(module, *, backend):
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(fxc.ArtifactError, match="cannot compile or run the model: RuntimeError: no compiler; in"):
        fxc.compile(program, "inductor")


def test_a_size_that_inductor_cannot_compile_later_is_explained(program, monkeypatch):
    def compile_one_size(module, *, backend):
        def run(x, scale):
            if len(x) == 5:
                raise TypeError("no such size")
            return module(x, scale)

        return run

    monkeypatch.setattr(torch, "compile", compile_one_size)
    fast = fxc.compile(program, "inductor")
    with pytest.raises(fxc.ArtifactError, match="cannot compile or run the model: TypeError: no such size; "):
        fast(torch.randn(5, 6), torch.rand(5, 4))


def test_emitted_and_other_modules_are_taken(program, model):
    x, scale = torch.randn(5, 6), torch.rand(5, 4)
    with torch.no_grad():
        expected = model(x, scale)["all"][1]
    for fast in (fxc.compile(program.emit(), "eager"), fxc.compile(model, "eager", {"x": x, "scale": scale})):
        torch.testing.assert_close(fast(x=x, scale=scale)["all"][1], expected)


@pytest.mark.parametrize("engine", ["eager", "onnxruntime", "openvino"])
def test_an_input_that_does_not_fit_is_named(program, engine):
    fast = fxc.compile(program, engine)
    for scale in (torch.rand(5, 4).double(), torch.rand(5, 3), torch.rand(4)):
        with pytest.raises(fxc.InputError, match=r"input 'scale' is .* where the model was traced with .*\(any, 4\)"):
            fast(torch.randn(5, 6), scale)


def test_a_module_without_inputs_and_an_unknown_engine(model, program):
    with pytest.raises(fxc.InputError, match="this TwoWays carries no example inputs; pass example_inputs"):
        fxc.compile(model, "eager")
    with pytest.raises(fxc.InputError, match="no engine 'onnxruntme'; did you mean 'onnxruntime'"):
        fxc.compile(program, "onnxruntme")


def test_auto_takes_the_fastest_and_says_what_it_measured(program, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setitem(compile_module.ENGINES, "onnxruntime", slow)  # type: ignore[arg-type]
    fast = fxc.compile(program, "auto")
    assert fast.engine == "eager"
    assert list(fast.measured) == ["eager", "onnxruntime", "openvino"]
    assert " ms ± " in fast.measured["onnxruntime"]
    assert 'pip install "fxcompress[openvino]"' in fast.measured["openvino"]
    assert "measured={'eager': " in repr(fast)
    x, scale = torch.randn(5, 6), torch.rand(5, 4)
    torch.testing.assert_close(fast(x=x, scale=scale)["sum"], model(x, scale)["sum"])


def slow(module, interface):
    def call(*args, **kwargs):
        time.sleep(0.02)
        return module(*args, **kwargs)

    return call, 1


def test_bench_gives_speed_beside_fidelity():
    eager, onnx = bench(toy_program(), ["onnxruntime"], rounds=2)
    assert (eager.engine, onnx.engine) == ("eager", "onnxruntime")
    assert eager.fidelity.exact
    assert eager.speedup == 1
    assert eager.size == sum(each.nbytes for each in toy_program().graph_module.parameters())
    assert isinstance(onnx.latency, Latency)
    assert onnx.fidelity.max_rel_error < 1e-5


def test_bench_says_what_installs_a_missing_engine(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    eager, openvino = bench(toy_program(), ["openvino"], rounds=1)
    assert eager.failure == ""
    assert openvino.latency is None
    assert 'pip install "fxcompress[openvino]"' in openvino.failure


def test_bench_refuses_an_empty_batch_and_an_unknown_engine():
    with pytest.raises(fxc.InputError, match="cannot measure 25 rounds of a batch of 0; give at least 1 of each"):
        bench(toy_program(), batch=0)
    with pytest.raises(fxc.InputError, match="cannot measure 0 rounds"):
        bench(toy_program(), rounds=0)
    with pytest.raises(fxc.InputError, match="no engine 'opnvino'; did you mean 'openvino'"):
        bench(toy_program(), ["opnvino"])


def test_inductor_may_not_change_classes_of_a_model_that_is_not_quantized(monkeypatch):
    program = fxc.trace(nn.Flatten(), torch.arange(8).view(2, 2, 2))
    monkeypatch.setattr(torch, "compile", lambda module, *, backend: lambda *args: module(*args) + 1)
    with pytest.raises(fxc.VerificationError, match=r"output 0 \(torch.int64\) differs in 8 of 8 elements"):
        fxc.compile(program, "inductor")
