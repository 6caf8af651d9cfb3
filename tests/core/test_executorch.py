"""ExecuTorch: what its files can grow to, which kernels they run, what is refused; more is in ``test_export``."""

import pytest
import torch
from models import BERT_INPUTS, residual_net, small_bert, small_vit
from quantizing import spoil_engine, spoil_weights
from torch import nn

import fxcompress as fxc
from fxcompress.engines.executed import executed_layers

pytest.importorskip("executorch")


def quantized(model, example, dynamic=None, batches=None):
    torch.manual_seed(0)
    task = fxc.Task(calibration=batches or [example] * 2, inputs=lambda batch: batch)
    program = fxc.trace(model.eval(), example, dynamic=dynamic)
    return fxc.PassManager("fold-batchnorm,insert-qdq{target=executorch}").run(program, task).program


def convolutions():
    return quantized(residual_net(), torch.randn(4, 3, 8, 8))


def vit():
    return quantized(small_vit(), torch.randn(4, 3, 32, 32))


def bert():
    inputs, dynamic = BERT_INPUTS
    return quantized(small_bert(), ((), inputs), dynamic, [((), inputs)] * 4)


@pytest.mark.parametrize(("subject", "count"), [(convolutions, 7), (vit, 6), (bert, 7)])
def test_every_layer_is_computed_in_integers(subject, count, tmp_path):
    file = fxc.export(subject(), tmp_path / "m.pte").path
    layers = [layer for layer in executed_layers(file) if "MatrixMultiply" not in layer.operator]
    assert [layer for layer in layers if not layer.integer] == []
    assert len(layers) == count


def test_layers_of_a_float_model_are_not(tmp_path):
    file = fxc.export(fxc.trace(residual_net().eval(), torch.randn(2, 3, 8, 8)), tmp_path / "m.pte").path
    assert [layer.integer for layer in executed_layers(file)] == [False] * 7


def test_a_kernel_of_its_own_is_not_in_integers(tmp_path):
    model = nn.Conv2d(2, 3, 2).double()  # XNNPACK has none
    file = fxc.export(fxc.trace(model, torch.randn(2, 2, 3, 3).double()), tmp_path / "m.pte").path
    assert [(layer.operator, layer.integer) for layer in executed_layers(file)] == [("aten::convolution", False)]


@pytest.mark.parametrize(("rows", "most"), [(2, 8), (3, 12)])
def test_a_batch_grows_to_its_bound(rows, most):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Softmax(-1)).eval()
    fast = fxc.compile(fxc.trace(model, torch.randn(rows, 4)), "executorch")
    for count in (1, most):
        x = torch.randn(count, 4)
        torch.testing.assert_close(fast(x), model(x))
    with pytest.raises(fxc.InputError, match=rf"input 'input' is \({most + 1}, 4\), .* at most \({most}, 4\)"):
        fast(torch.randn(most + 1, 4))


class Lambda(nn.Module):
    """An input whose name is a word of Python, and two whose lengths go together."""

    def forward(self, lambda_, longer):
        return lambda_ * longer[:, 1:]


def test_names_and_lengths_that_follow_from_others(tmp_path):
    inputs = {"lambda_": torch.randn(2, 4), "longer": torch.randn(2, 5)}
    program = fxc.trace(Lambda(), ((), inputs), dynamic={"lambda_": (1,), "longer": (1,)})
    assert fxc.export(program, tmp_path / "m.pte").max_relative_error < 1e-6


def test_integers_that_it_has_no_kernel_for(tmp_path):
    program = fxc.trace(nn.Sequential(nn.Linear(8, 4)).eval(), torch.randn(2, 8))
    after = fxc.PassManager("quantize-weights").run(program).program
    with pytest.raises(fxc.ArtifactError, match=r"has no kernel for .*; quantize with insert-qdq\{target=executorch\}"):
        fxc.export(after, tmp_path / "m.pte")


def rows_exchanged(integers):
    return integers.roll(1, 0)


def off_by_a_third(integers):
    return (integers * 1.33).clamp(-128, 127).to(torch.int8)


@pytest.mark.parametrize("change", [rows_exchanged, off_by_a_third])
def test_integers_of_weights_that_are_off_are_not_written(change, tmp_path, monkeypatch):
    program = convolutions()
    spoil_weights(monkeypatch, change)
    with pytest.raises(fxc.VerificationError, match="differs from the model by"):
        fxc.export(program, tmp_path / "m.pte")
    assert list(tmp_path.iterdir()) == []


def test_an_engine_that_is_off_is_refused(tmp_path, monkeypatch):
    spoil_engine(monkeypatch, ".pte", 1.1)
    with pytest.raises(fxc.VerificationError, match=r"an SQNR of .*Quantize for another target"):
        fxc.export(convolutions(), tmp_path / "m.pte")
    assert list(tmp_path.iterdir()) == []


class Bessel(nn.Module):
    def forward(self, x):
        return torch.special.i1e(x)


def test_an_operator_without_a_kernel_is_named(tmp_path):
    with pytest.raises(
        fxc.ArtifactError, match=r"m\.pte cannot be written: ExecuTorch .*i1e.*export to another format"
    ):
        fxc.export(fxc.trace(Bessel(), torch.randn(2, 4)), tmp_path / "m.pte")
    assert list(tmp_path.iterdir()) == []
