"""Models whose forward is a function, and how a Program is compared with one."""

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxcompress.verification.numerics import compare_outputs


def assert_same(model, program, *args, **kwargs):
    model.eval()
    with torch.no_grad():
        expected = pytree.tree_leaves(model(*args, **kwargs))
        found = pytree.tree_leaves(program(*args, **kwargs))
    assert compare_outputs(expected, found).max_rel_error < 1e-6


class Model(nn.Module):
    """A module whose forward is given as a function; its state is what the keywords say."""

    def __init__(self, function, **state):
        super().__init__()
        self.function = function
        for name, value in state.items():
            setattr(self, name, value)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)
