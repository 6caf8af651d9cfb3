"""What coverage checks of channel removal: half of every group goes, and the rest must be exact and usable."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import capture_checks

PIPELINE = "select-channels{{ratio=0.5 criterion={}}},remove-channels"


def check_removal(subject: Any, row: dict[str, Any]) -> dict[str, Any]:
    """The slim model computes what the oracle does, at two batch sizes (the manager's default instruments)."""
    import fxcompress as fxc

    program = fxc.trace(subject.model, (subject.args, subject.kwargs))
    return removed(program)


def removed(program: Any) -> dict[str, Any]:
    import fxcompress as fxc

    meta = any(parameter.is_meta for parameter in program.graph_module.parameters())
    result = fxc.PassManager(PIPELINE.format("random" if meta else "l2")).run(program)  # on meta, no weights to compare
    before, after = fxc.analyze(program, "cost"), fxc.analyze(result.program, "cost")
    return {
        "_program": result.program, "nodes": len(program.graph.nodes), "macs": before.macs, "params": before.params,
        "macs_ratio": after.macs / before.macs, "params_ratio": after.params / before.params,
        "meta": meta,
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


CHECKS = {"removal": check_removal, "training": check_training, "exports": check_exports}
ISLAND_CHECKS = {"islands": check_islands}
