"""What a model does only in training, and so is not in a Program captured in eval mode."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterable

from torch import fx, nn

from fxcompress.ir.layers import layer_of
from fxcompress.ir.program import Diagnostic

_LISTED = 3


def training_only(model: nn.Module, graph: fx.Graph) -> list[Diagnostic]:
    """Lists modules whose forward reads ``self.training`` and that no raised layer stands for, one entry a class."""
    raised = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    found: dict[type[nn.Module], list[str]] = defaultdict(list)
    for path, module in model.named_modules():
        if path in raised or layer_of(module) is not None or not _reads_training(type(module)):
            continue
        found[type(module)].append(path or "the model itself")
    return [
        Diagnostic(
            "training-only",
            f"{kind.__name__} ({_listing(paths)}) behaves differently in training; what it does then was not captured",
            paths[0],
        )
        for kind, paths in found.items()
    ]


def dropped_state(names: Iterable[str]) -> list[Diagnostic]:
    """One entry for all state that no output depends on."""
    listed = sorted(names)
    if not listed:
        return []
    return [Diagnostic("unused-state", f"no output depends on {_listing(listed)}; dropped", listed[0])]


def _reads_training(kind: type[nn.Module]) -> bool:
    forward = inspect.unwrap(kind.forward)
    code = getattr(forward, "__code__", None)
    return code is not None and "training" in code.co_names


def _listing(names: list[str]) -> str:
    shown = ", ".join(names[:_LISTED])
    more = len(names) - _LISTED
    return shown if more <= 0 else f"{shown} and {more} more"
