"""Random numbers that a model draws also in eval mode."""

from __future__ import annotations

from torch import Tag, fx
from torch._ops import OpOverload

from fxcompress.ir.ops import bind
from fxcompress.ir.program import Diagnostic

_MODES = ("train", "training")
_RATES = ("p", "dropout_p", "dropout")


def draws(node: fx.Node) -> bool:
    """Whether a node draws random numbers as it is called: a dropout in eval mode or with rate 0 does not."""
    if not isinstance(node.target, OpOverload) or Tag.nondeterministic_seeded not in node.target.tags:
        return False
    call = bind(node.target, node.args, node.kwargs)
    if any(call.get(mode) is False for mode in _MODES):
        return False
    rates = [call[rate] for rate in _RATES if rate in call]
    return any(rates) if rates else True


def random_draws(graph: fx.Graph) -> list[Diagnostic]:
    """One entry for each operation that draws random numbers."""
    return [
        Diagnostic(
            "random",
            f"{node.target} draws random numbers also in eval mode{_place(node)}: outputs differ from call to call, "
            "and checks run with a fixed seed; pass the random tensor as an input for results that repeat",
        )
        for node in graph.nodes
        if draws(node)
    ]


def _place(node: fx.Node) -> str:
    """The innermost line of the model's own code."""
    trace = str(node.meta.get("stack_trace") or "")
    lines = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    return f" at {lines[-1]}" if lines else ""
