"""An emitted module back through torch.export, with the dynamic dims it was traced with."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_flatten, tree_map

from fxcompress.ir.program import Interface
from fxcompress.tracing.capture import export
from fxcompress.tracing.inputs import ExampleInputs


def reexport(model: nn.Module, interface: Interface) -> ExportedProgram:
    """Exports a module that is in eval mode.

    Raises:
        CaptureError: torch.export cannot capture it.
    """
    # One tensor passed twice is two inputs: torch.export looks their dynamic dims up by identity.
    args, kwargs = tree_map(
        lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, (interface.args, interface.kwargs)
    )
    labels = ("",) * interface.in_spec.num_leaves
    inputs = ExampleInputs(
        args, kwargs, interface.names, interface.in_spec, labels, dict(interface.dynamic), dict(interface.batch)
    )
    return export(model, inputs)


class TensorOutputs(nn.Module):
    """A model's outputs as a flat tuple, without what is no tensor: engines have no place for it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

        @functools.wraps(model.forward)  # torch.export reads the signature, and names what it guards after it
        def forward(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
            named = {id(leaf) for leaf in tree_flatten((args, kwargs))[0]}
            results = []
            for leaf in tree_flatten(model(*args, **kwargs))[0]:
                if isinstance(leaf, torch.Tensor):  # a file has one name for each that goes in or comes out
                    results.append(leaf.clone() if id(leaf) in named else leaf)
                    named.add(id(leaf))
            return tuple(results)

        self.forward = forward
