"""Torch-Pruning on the zoo, beside removal: the same ratio, its own default pruner, and a time limit."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

PEER_SECONDS = 100


def check_peer(subject: Any, row: dict[str, Any]) -> dict[str, Any]:
    """The default pruner at ratio 0.5: MACs left. It takes no inputs by keyword."""
    import torch_pruning

    model = subject.model
    if subject.kwargs:
        raise TypeError("takes no inputs by keyword")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise TypeError("takes no model on the meta device")
    with time_limit(PEER_SECONDS):
        before, _ = torch_pruning.utils.count_ops_and_params(model, subject.args)
        head = [module for name, module in model.named_modules() if is_head(name, module)]
        pruner = torch_pruning.pruner.MagnitudePruner(
            model, subject.args, importance=torch_pruning.importance.MagnitudeImportance(p=2),
            pruning_ratio=0.5, ignored_layers=head,
        )  # fmt: skip
        pruner.step()
        model(*subject.args)
        after, _ = torch_pruning.utils.count_ops_and_params(model, subject.args)
    return {"peer_macs_ratio": after / before}


def is_head(name: str, module: Any) -> bool:
    """A layer that gives the classes must keep its outputs; Torch-Pruning has to be told."""
    return getattr(module, "out_features", getattr(module, "out_channels", None)) in (1000, 21, 400)


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def expire(signum: int, frame: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    previous = signal.signal(signal.SIGALRM, expire)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


CHECKS = ISLAND_CHECKS = {"peer": check_peer}
