"""Small models and ways to bring them into a state that tests can tell right from wrong in."""

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from fxcompress.manager.pass_manager import PassManager


def settled(model, seed=0):
    """The model in float64 and eval mode, with random parameters and batch norm statistics, as after training."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()

    def fill(tensor, low, high):
        tensor.uniform_(low, high, generator=generator)

    with torch.no_grad():
        for parameter in model.parameters():
            fill(parameter, -0.5, 0.5)
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                if module.running_mean is not None:
                    fill(module.running_mean, -0.5, 0.5)
                    fill(module.running_var, 0.3, 2.0)
                if module.weight is not None:
                    fill(module.weight, 0.5, 1.5)
    return model


def inputs(*shape, seed=1):
    """A random float64 tensor."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def run_pass(item, program):
    """The Program that a pass makes, checked by the manager as every transform is, and what the pass says it did."""
    done = PassManager([item]).run(program)
    return done.program, done.records[0].result


def layer_kinds(program):
    """Class names of the called modules, in order."""
    return [
        type(program.graph_module.get_submodule(node.target)).__name__
        for node in program.nodes
        if node.op == "call_module"
    ]
