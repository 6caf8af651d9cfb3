"""What the tests of channel removal share: prune a model with every check on, and say how wide it became."""

import torch
from models import settled
from torch import nn
from torch.utils._pytree import tree_leaves

from fxcompress import PassManager, trace


def prune(model, *xs, ratio=0.5, **options):
    """The Program after half of every group is gone, which the oracle has compared at two batch sizes.

    Also emits it and trains it for a step.
    """
    before = trace(settled(model), tuple(xs), **options)
    done = PassManager(f"select-channels{{ratio={ratio}}},remove-channels").run(before)
    check_trains(done.program, xs)
    return done.program


def check_trains(program, xs):
    """Every parameter that is used gets a gradient, and a step changes what the emitted model computes."""
    model = program.emit().train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = sum(out.square().mean() for out in tree_leaves(model(*xs)) if out.is_floating_point())
    loss.backward()
    assert trained
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trained)
    torch.optim.SGD(trained, 1e-3).step()
    again = sum(out.square().mean() for out in tree_leaves(model(*xs)) if out.is_floating_point())
    assert again.isfinite()
    assert again != loss


def shapes(program):
    """Name -> shape of each matrix or kernel; ``.weight`` is left out of names."""
    return {
        name.removesuffix(".weight"): tuple(parameter.shape)
        for name, parameter in program.graph_module.named_parameters()
        if parameter.dim() > 1
    }


def lengths(program):
    """Name -> length of each vector of parameters or statistics."""
    root = program.graph_module
    named = (*root.named_parameters(), *root.named_buffers())
    return {name: len(tensor) for name, tensor in named if tensor.dim() == 1}


class Sequential(nn.Sequential):
    """Layers called one after the other, by names given as keywords."""

    def __init__(self, **layers):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


class Wire(nn.Module):
    """Layers by name, and how they are wired: a function of the module and its inputs."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.wiring = forward
        for name, layer in layers.items():
            if isinstance(layer, nn.Module):
                self.add_module(name, layer)
            elif isinstance(layer, nn.Parameter):
                self.register_parameter(name, layer)
            else:
                self.register_buffer(name, layer)

    def forward(self, *xs):
        return self.wiring(self, *xs)


def weight(*shape):
    """A parameter, which :func:`settled` fills."""
    return nn.Parameter(torch.zeros(*shape))
