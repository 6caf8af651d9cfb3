"""What the tests of quantized files share."""

from dataclasses import replace

import torch
from torch import nn

import fxcompress as fxc
from fxcompress.engines import export
from fxcompress.engines.formats import FORMATS

ENGINES = {"onnxruntime": ".onnx", "openvino": ".xml"}


def quantized(model, x, target, options=""):
    torch.manual_seed(0)
    program = fxc.trace(model.eval(), x)
    pipeline = f"fold-batchnorm,insert-qdq{{target={target} {options}}}"
    return fxc.PassManager(pipeline).run(program, fxc.Task(calibration=[x])).program


def spoil_weights(monkeypatch, change):
    """Files are written with other integers for the first weight."""
    right = export.with_integer_weights

    def wrong(module):
        made = right(module)
        name, integers = next((name, value) for name, value in made.named_buffers() if value.dtype == torch.int8)
        path, _, leaf = name.rpartition(".")
        setattr(made.get_submodule(path), leaf, change(integers))
        return made

    monkeypatch.setattr(export, "with_integer_weights", wrong)


def spoil_engine(monkeypatch, suffix, factor):
    """The engine of a format gives that many times what is right."""
    real = FORMATS[suffix]

    def open_broken(path, names):
        run = real.open(path, names)
        return lambda tensors: [value * factor for value in run(tensors)]

    monkeypatch.setitem(FORMATS, suffix, replace(real, open=open_broken))


class Joined(nn.Module):
    """A norm that no layer takes in, as in DenseNet."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(8, 4, 1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        return self.last(self.norm(torch.cat([self.first(x), self.second(x)], 1)).relu())
