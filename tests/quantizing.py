"""What the tests of quantized files share."""

import torch
from torch import nn

import fxcompress as fxc

ENGINES = {"onnxruntime": ".onnx", "openvino": ".xml"}


def quantized(model, x, target, options=""):
    torch.manual_seed(0)
    program = fxc.trace(model.eval(), x)
    pipeline = f"fold-batchnorm,insert-qdq{{target={target} {options}}}"
    return fxc.PassManager(pipeline).run(program, fxc.Task(calibration=[x])).program


class Joined(nn.Module):
    """A norm that no layer takes in, as in DenseNet."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(8, 4, 1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        return self.last(self.norm(torch.cat([self.first(x), self.second(x)], 1)).relu())
