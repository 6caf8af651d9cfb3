"""What a model does only in training, and so is not in a Program captured in eval mode."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from torch import fx, nn

from fxcompress.ir.layers import layer_of
from fxcompress.ir.program import Diagnostic

_LISTED = 3


def training_only(model: nn.Module, graph: fx.Graph) -> list[Diagnostic]:
    """Lists modules whose forward reads ``self.training`` and that no raised layer stands for, one entry a class."""
    raised = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    found: dict[type[nn.Module], list[str]] = defaultdict(list)
    for path, module in model.named_modules():
        stands = path in raised or layer_of(module) is not None
        if _own_train(module) or _hooks_read_training(module) or (not stands and _names_training(type(module).forward)):
            found[type(module)].append(path or "the model itself")
    return [
        Diagnostic(
            "training-only",
            f"{kind.__name__} ({listing(paths)}) behaves differently in training; what it does then was not captured",
            paths[0],
        )
        for kind, paths in found.items()
    ]


def dropped_state(names: Iterable[str]) -> list[Diagnostic]:
    """One entry for all state that no output depends on."""
    listed = sorted(names)
    if not listed:
        return []
    return [Diagnostic("unused-state", f"no output depends on {listing(listed)}; dropped", listed[0])]


def _own_train(module: nn.Module) -> bool:
    """Whether ``train`` sets modes in its own way, for example to keep batch norms in eval mode."""
    return type(module).train is not nn.Module.train


def _hooks_read_training(module: nn.Module) -> bool:
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return any(_names_training(hook if hasattr(hook, "__code__") else type(hook).__call__) for hook in hooks)


def _names_training(function: Any) -> bool:
    """Whether a function's code reads an attribute called ``training``."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code is not None and "training" in code.co_names


def listing(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    shown = ", ".join(names[:_LISTED])
    more = len(names) - _LISTED
    return shown if more <= 0 else f"{shown} and {more} more"
