"""What a model does only in training, and so is not in a Program captured in eval mode."""

from __future__ import annotations

import inspect
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import CodeType, FunctionType
from typing import Any

from torch import fx, nn
from torch.autograd.function import BackwardCFunction

from fxcompress.ir.layers import layer_of
from fxcompress.ir.program import Diagnostic

_LISTED = 3


def training_only(model: nn.Module, graph: fx.Graph) -> list[Diagnostic]:
    """Lists modules whose forward reads ``self.training`` and that no raised layer stands for, one entry a class."""
    raised = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    found: dict[type[nn.Module], list[str]] = defaultdict(list)
    for path, module in model.named_modules():
        stands = path in raised or layer_of(module) is not None
        if (
            _own_train(module)
            or _hooks_read_training(module)
            or (not stands and _names_training(type(module).forward, type(module)))
        ):
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


def _names_training(function: Any, owner: type | None = None, seen: set[Any] | None = None) -> bool:
    """Whether a function, or one that it calls by name, reads an attribute called ``training``.

    Args:
        function: Where to look.
        owner: The class whose methods the function calls on itself.
        seen: Functions that need no second look.
    """
    seen = set() if seen is None else seen
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None)
    if code is None or function in seen:
        return False
    seen.add(function)
    names = set(_names(code))
    if "training" in names:
        return True
    called = [vars(kind)[name] for name in names for kind in getattr(owner, "__mro__", ()) if name in vars(kind)]
    called += [function.__globals__[name] for name in names if name in function.__globals__]
    return any(
        _names_training(other, owner, seen)
        for other in called
        if isinstance(other, FunctionType) and not other.__module__.startswith("torch.")
    )


def _names(code: CodeType) -> Iterator[str]:
    """Names that code reads, with the functions defined in it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


@contextmanager
def custom_backwards(model: nn.Module) -> Iterator[list[Diagnostic]]:
    """Watches for ``torch.autograd.Function``: what they compute is captured, their own backward is not.

    Yields:
        One diagnostic for each class of them, filled as the model runs.
    """
    paths = {module: path for path, module in model.named_modules()}
    found: dict[str, Diagnostic] = {}

    def note(context: Any) -> None:
        kind = context._forward_cls
        if not kind.__module__.startswith("torch."):
            found.setdefault(kind.__qualname__, _lost(kind.__qualname__, _caller(paths)))

    result: list[Diagnostic] = []
    # ``apply`` may be held under other names; whatever its name, it makes a context for the backward.
    BackwardCFunction.__init__ = note  # type: ignore[method-assign, assignment]
    try:
        yield result
    finally:
        del BackwardCFunction.__init__
        result += found.values()


def _caller(paths: dict[nn.Module, str]) -> str | None:
    """Path of the module in whose forward we are."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and module in paths:
            return paths[module] or "the model itself"
    return None


def _lost(name: str, path: str | None) -> Diagnostic:
    return Diagnostic(
        "custom-backward",
        f"the backward of {name} was not captured: in training, gradients are those of the operations in its forward; "
        "a straight-through estimator is x + (f(x) - x).detach()",
        path,
    )


def listing(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    shown = ", ".join(names[:_LISTED])
    more = len(names) - _LISTED
    return shown if more <= 0 else f"{shown} and {more} more"
