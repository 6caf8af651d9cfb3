"""What coverage checks of channel removal: half of every group goes, and the rest must be exact and usable."""

from __future__ import annotations

import contextlib
import copy
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import capture_checks

PIPELINE = "select-channels{ratio=0.5},remove-channels"
PEER_SECONDS = 100


def check_removal(subject: Any, row: dict[str, Any]) -> dict[str, Any]:
    """The slim model computes what the oracle does, at two batch sizes (the manager's default instruments)."""
    import fxcompress as fxc

    program = fxc.trace(subject.model, (subject.args, subject.kwargs))
    return removed(program)


def removed(program: Any) -> dict[str, Any]:
    import fxcompress as fxc

    result = fxc.PassManager(PIPELINE).run(program)
    before, after = fxc.analyze(program, "cost"), fxc.analyze(result.program, "cost")
    return {
        "_program": result.program, "nodes": len(program.graph.nodes), "macs": before.macs, "params": before.params,
        "macs_ratio": after.macs / before.macs, "params_ratio": after.params / before.params,
        "meta": any(parameter.is_meta for parameter in program.graph_module.parameters()),
        "barriers": sorted({d.message.split()[0] for d in fxc.analyze(program, "channels").diagnostics}),
    }  # fmt: skip


def check_training(subject: Any, row: dict[str, Any]) -> dict[str, Any]:
    """One step of SGD with batch norm in train mode moves the slim model's weights."""
    import torch

    if row["meta"]:
        return {}
    slim = row["_program"].emit()
    capture_checks.batch_norms_train(slim)
    optimizer = torch.optim.SGD(slim.parameters(), lr=1e-3)
    with capture_checks.mha_fast_path_off():
        capture_checks.loss(slim(*subject.args, **subject.kwargs)).backward()
    optimizer.step()
    if not any(p.grad is not None and p.grad.abs().max() > 0 for p in slim.parameters()):
        raise AssertionError("no weight has a gradient")
    return {}


def check_exports(subject: Any, row: dict[str, Any]) -> dict[str, Any]:
    """ONNX and .pt2 files of the slim model compute what it does (both are run after they are written)."""
    if row["meta"]:
        return {}
    exported(row["_program"])
    return {}


def exported(program: Any) -> None:
    import fxcompress as fxc

    with tempfile.TemporaryDirectory() as folder:
        for name in ("slim.onnx", "slim.pt2"):
            fxc.export(program, Path(folder) / name)


def check_peer(subject: Any, row: dict[str, Any]) -> dict[str, Any]:
    """Torch-Pruning's default pruner at the same ratio, where it is installed: MACs left, or why it failed."""
    try:
        import torch_pruning
    except ImportError:
        return {}
    if row["meta"] or subject.kwargs:
        return {}
    model = copy.deepcopy(subject.model)
    try:
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
    except Exception as error:
        return {"peer_failed": f"{type(error).__name__}: {str(error)[:200]}"}
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


def check_islands(subject: Any, row: dict[str, Any]) -> dict[str, Any]:
    """Each captured part by itself, its interface kept."""
    import fxcompress as fxc

    partial = fxc.trace_islands(subject.model, (subject.args, subject.kwargs))
    found = {}
    for name, program in partial.islands.items():
        found[name] = removed(program)
        exported(found[name]["_program"])
    before = sum(island["macs"] for island in found.values())
    after = sum(island["macs"] * island["macs_ratio"] for island in found.values())
    return {
        "meta": False, "macs": before, "macs_ratio": after / before,
        "barriers": sorted({barrier for island in found.values() for barrier in island["barriers"]}),
    }  # fmt: skip


CHECKS = {"removal": check_removal, "training": check_training, "exports": check_exports, "peer": check_peer}
ISLAND_CHECKS = {"islands": check_islands}
