"""insert-qdq: zeros around an image are a convolution's padding, not a stop between integers."""

import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional

import fxcompress as fxc
from fxcompress.engines.executed import executed_layers


class Padded(nn.Module):
    def __init__(self, value=0.0, sizes=(0, 1, 0, 1)):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, stride=2)
        self.value, self.sizes = value, sizes

    def forward(self, x):
        return self.second(functional.pad(torch.relu(self.first(x)), self.sizes, value=self.value))


def quantized(model, target):
    torch.manual_seed(0)
    images = torch.randn(8, 3, 12, 12)
    done = fxc.PassManager(f"insert-qdq{{target={target} weight-bits=7}}").run(
        fxc.trace(model.eval(), images), fxc.Task(calibration=[images])
    )
    return done.program


def operators(program):
    return [node.name for node in program.nodes if node.op != "get_attr"]


@pytest.mark.parametrize(("target", "suffix"), [("onnxruntime", ".onnx"), ("openvino", ".xml")])
def test_an_engine_pads_in_the_convolution(target, suffix, tmp_path):
    program = quantized(Padded(), target)
    names = operators(program)
    assert names[names.index("pad") - 1].startswith("dequantize_per_tensor")
    assert next(iter(next(n for n in program.nodes if n.name == "pad").users)).name == "second"
    file = tmp_path / f"padded{suffix}"
    fxc.export(program, file)
    layers = executed_layers(file)
    assert len(layers) == 2
    assert all(layer.integer for layer in layers)
    fxc.export(program, tmp_path / "padded.onnx")
    assert "Pad" not in {node.op_type for node in onnx.load(tmp_path / "padded.onnx").graph.node}


@pytest.mark.parametrize("model", [Padded(value=1.0), Padded(sizes=(0, 1, 0, 1, 0, 0))])
def test_other_pads_stay_in_floating_point(model):
    program = quantized(model, "openvino")
    pad = next(node for node in program.nodes if "pad" in node.name)
    assert not pad.args[0].name.startswith("dequantize")
    assert all(user.name.startswith("quantize") for user in pad.users)
