"""An emitted module back through torch.export, with the dynamic dims it was traced with."""

from __future__ import annotations

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_map

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
