"""Export of quantized models: files are written around faults of engines."""

import openvino
import pytest
import torch
from quantizing import quantized
from torch import nn

import fxcompress as fxc


class Parted(nn.Module):
    """A convolution without a bias, which one reads in integers, be it times a number, and another does not."""

    def __init__(self, between=None):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 8, 3, padding=1)
        self.between = between or nn.Identity()

    def forward(self, x):
        x = self.stem(x)
        return self.conv(self.between(x)) * x.square().mean(1, keepdim=True).sqrt()


class Half(nn.Module):
    def forward(self, x):
        return x / 2


class Pooled(nn.Module):
    """The maximum of a convolution whose bias is zero, which files leave out, beside its result."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x):
        x = self.conv(self.stem(x).relu())
        return x, nn.functional.max_pool2d(x, 2)


class Normed(nn.Module):
    """A norm that stays a product, as what it reads has another reader, and that a quantizer reads."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        nn.init.uniform_(self.norm.weight, 0.5, 0.8)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.conv(self.norm(x).relu()) + x.exp()


class Windows(nn.Module):
    """Overlapping windows, which files gather with a table of indices, of what a layer without a bias gives."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, bias=False), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = nn.functional.pad(self.conv(self.stem(x).relu()), [1] * 4)
        return self.last(x.unfold(2, 4, 2).mean(-1))


class Between(nn.Module):
    """Something between two layers in integers, the first of which another one reads, too."""

    def __init__(self, between):
        super().__init__()
        self.stem, self.conv, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)
        self.between = between

    def forward(self, x):
        x = self.stem(x)
        return self.last(self.between(x)), self.conv(x)


def padded_mean(x):
    return nn.functional.avg_pool2d(x, 3, stride=2, padding=1)


def rounded_up_mean(x):
    return nn.functional.avg_pool2d(x, 3, stride=2, ceil_mode=True)


def greatest(x):
    return x.amax((2, 3), keepdim=True).sigmoid()


def least(x):
    return nn.functional.gelu(x.amin(1, keepdim=True)).expand_as(x)


def places_again(x):
    return x.mean((2, 3))[:, :, None, None]


FAULTS = {
    "parted": Parted(),
    "scaled": Parted(Half()),
    "pooled": Pooled(),
    "normed": Normed(),
    "windows": Windows(),
    **{between.__name__: Between(between) for between in (padded_mean, greatest, least, places_again)},
}


@pytest.mark.parametrize("model", FAULTS.values(), ids=FAULTS)
def test_files_are_written_around_faults_of_openvino(model, tmp_path):
    """What is written is right, and so is what OpenVINO makes of it; ``export`` compares both."""
    program = quantized(model, torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1)), "openvino")
    exported = fxc.export(program, tmp_path / "m.xml")
    assert exported.max_relative_error < 0.05


def test_averages_over_windows_beyond_the_end_in_onnxruntime(tmp_path):
    program = quantized(Between(rounded_up_mean), torch.randn(8, 3, 8, 8), "onnxruntime")
    assert fxc.export(program, tmp_path / "m.onnx").max_relative_error < 0.05


def test_layers_with_real_weights_are_not_written_around(tmp_path):
    model, x = Between(nn.Identity()), torch.randn(8, 3, 8, 8)
    model.stem.bias = None
    manager = fxc.PassManager("insert-qdq{target=openvino skip=[stem last]}")
    program = manager.run(fxc.trace(model, x), fxc.Task(calibration=[x])).program
    path = fxc.export(program, tmp_path / "m.xml").path
    added = [node for node in openvino.Core().read_model(path).get_ops() if node.get_type_name() == "Add"]
    assert len(added) == 2, "the biases of two layers"


def test_a_last_layer_whose_bias_has_coarse_steps_in_onnxruntime(tmp_path):
    """Where nothing ever comes out of a ReLU, its integers have a scale of 1."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    nn.init.constant_(model[0].bias, -100)
    program = quantized(model, torch.randn(8, 8), "onnxruntime")
    assert fxc.export(program, tmp_path / "m.onnx").max_relative_error < 1e-2


class Multiplied(nn.Module):
    """A product between two layers."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.factor = nn.Linear(64, 64), nn.Linear(64, 8), nn.Parameter(torch.randn(64, 64))

    def forward(self, x):
        return self.last(self.first(x) @ self.factor)


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_layers_in_integers_beside_products_in_16_bits(suffix, tmp_path):
    torch.manual_seed(0)
    program = fxc.trace(Multiplied().eval(), torch.randn(4, 64))
    program = fxc.PassManager("quantize-weights,cast").run(program).program
    assert 1e-4 < fxc.export(program, tmp_path / f"m{suffix}").max_relative_error < 2e-2
