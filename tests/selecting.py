"""What the tests of channel selection share: small models, and what a plan removes from each group."""

from models import inputs, settled
from pruning import Sequential
from torch import nn
from torch.nn import functional as F

import fxcompress as fxc

IMAGE, TOKENS = inputs(2, 3, 8, 8), inputs(2, 6, 8)


def chain(*widths, **layers):
    """Convolutions conv0, conv1, ... of these widths, and 1 x 1 pixels at the end."""
    convs = {
        f"conv{i}": nn.Conv2d(a, b, 3, padding=1) for i, (a, b) in enumerate(zip((3, *widths), widths, strict=False))
    }
    return Sequential(**convs, last=nn.Conv2d(widths[-1], 2, 1), **layers)


def traced(model, x=IMAGE):
    return fxc.trace(settled(model), x)


def plan(model, options, x=IMAGE, task=None):
    return fxc.analyze(model if isinstance(model, fxc.Program) else traced(model, x), f"select-channels{options}", task)


def removed(found):
    """Name and factor of a group, and how many of its units go."""
    return {(r.name.removesuffix(".weight:0"), r.factor): len(r.removed) for r in found.removals}


def counts(model, options, x=IMAGE, task=None):
    return {name: count for (name, _), count in removed(plan(model, options, x, task)).items()}


class Attention(nn.Module):
    """Self-attention of some heads x dims, over 6 tokens of 8 channels."""

    def __init__(self, heads, dims):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(8, 3 * heads * dims), nn.Linear(heads * dims, 8)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
