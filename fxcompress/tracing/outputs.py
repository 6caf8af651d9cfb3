"""Outputs that a graph cannot return: objects of classes PyTorch cannot take apart, such as a key-value cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten_with_path, tree_leaves, tree_map

from fxcompress.ir.program import Diagnostic
from fxcompress.tracing.structures import register_dataclasses

_PLAIN = (
    torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool, torch.dtype, torch.device, int, float, complex, str,
    bytes, type(None),
)  # fmt: skip


@contextmanager
def plain_outputs(model: nn.Module) -> Iterator[list[Diagnostic]]:
    """While it lasts, the model gives ``None`` in place of objects that are no tensors and no known structure.

    Yields:
        One diagnostic for each class of such objects, filled as the model runs.
    """
    found: list[Diagnostic] = []

    def without_objects(module: nn.Module, args: Any, output: Any) -> Any:
        register_dataclasses(output)
        if all(isinstance(leaf, _PLAIN) for leaf in tree_leaves(output)):
            return None
        for path, leaf in tree_flatten_with_path(output)[0]:
            if not isinstance(leaf, _PLAIN):
                diagnostic = _dropped(type(leaf), "".join(map(str, path)))
                if diagnostic not in found:
                    found.append(diagnostic)
        return tree_map(lambda leaf: leaf if isinstance(leaf, _PLAIN) else None, output)

    handle = model.register_forward_hook(without_objects)
    try:
        yield found
    finally:
        handle.remove()


def _dropped(kind: type, where: str) -> Diagnostic:
    return Diagnostic(
        "output-dropped",
        f"output {where or 'itself'} is a {kind.__name__}, which PyTorch cannot take apart, and was left out; to keep "
        "it, register its class with torch.utils._pytree.register_pytree_node",
    )
