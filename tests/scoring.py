"""Small networks with one group of channels or heads, and their scores by a criterion."""

import torch
from fxcompress.passes.channels.criteria import Evidence, criterion_of
from models import inputs, settled
from torch import nn
from torch.nn import functional as F

import fxcompress as fxc

IMAGES = inputs(2, 2, 6, 6)


class Stack(nn.Module):
    """Two convolutions with a batch norm between: one group of 5 channels."""

    def __init__(self, bias=True):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 5, 3, bias=bias)
        self.bn = nn.BatchNorm2d(5)
        self.conv2 = nn.Conv2d(5, 3, 1)

    def forward(self, x):
        return self.conv2(self.bn(self.conv1(x)).relu())


class Attention(nn.Module):
    """Self-attention of 2 heads x 3 dims, written out."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 6, bias=False) for _ in range(3))
        self.out = nn.Linear(6, 4, bias=False)

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (2, 3)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def traced(model, x=IMAGES):
    return fxc.trace(settled(model), x)


def task(*batches):
    return fxc.Task(calibration=batches or [IMAGES, inputs(3, 2, 6, 6, seed=2)], loss=lambda out, batch: square(out))


def square(out):
    return (out * torch.linspace(0, 1, out.numel(), dtype=out.dtype).reshape(out.shape)).square().mean()


def scored(program, name, task=None, group=0, **evidence):
    """The scores of one group's units."""
    report = program.analyze("channels")
    scores = criterion_of(name).measure(Evidence(program, report, task, **evidence))
    return torch.from_numpy(scores[report.groups[group].units])


def agree(found, expected):
    torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=1e-14)
