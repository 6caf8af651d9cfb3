"""What coverage checks of int8: each model goes through insert-qdq, and the engine of the target runs what comes out.

Where an engine cannot run the model in floating point, int8 has nothing to run either: the row says why.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

SUFFIXES = {"onnxruntime": ".onnx", "openvino": ".xml"}
"""Target -> what its engine reads."""

LEAST_SQNR_DB = 3.0
"""Random weights and few samples make for coarse ranges; noise as strong as the signal is an error."""


def check_capture(subject: Any, row: dict[str, Any]) -> dict[str, Any]:
    import fxcompress as fxc

    if any(parameter.is_meta for parameter in subject.model.parameters()):
        return {"meta": True}
    program = fxc.PassManager("fold-batchnorm").run(fxc.trace(subject.model, (subject.args, subject.kwargs))).program
    return {"meta": False, "nodes": len(program.graph.nodes), "_parts": [(program, (subject.args, subject.kwargs))]}


def check_islands(subject: Any, row: dict[str, Any]) -> dict[str, Any]:
    """Each captured part by itself, on the inputs that it gets in the model."""
    import fxcompress as fxc

    partial = fxc.trace_islands(subject.model, (subject.args, subject.kwargs))
    programs = [fxc.PassManager("fold-batchnorm").run(program).program for program in partial.islands.values()]
    return {"meta": False, "_parts": [(p, (p.interface.args, p.interface.kwargs)) for p in programs]}


def check_onnxruntime(subject: Any, row: dict[str, Any]) -> dict[str, Any]:
    return runs("onnxruntime", "canonicalize-linear,insert-qdq{target=onnxruntime least=1 weight-bits=7}", row)


def check_openvino(subject: Any, row: dict[str, Any]) -> dict[str, Any]:
    return runs("openvino", "canonicalize-linear,insert-qdq{target=openvino least=1}", row)


def runs(engine: str, pipeline: str, row: dict[str, Any]) -> dict[str, Any]:
    """Exports each part for an engine, which runs and compares the file, and reads what the engine executes."""
    import torch
    from torch.utils._pytree import tree_leaves

    import fxcompress as fxc
    from fxcompress.engines.executed import executed_layers
    from fxcompress.verification.numerics import compare_outputs

    executed, sqnr, layers, refusals = [], [], 0, set()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"int8{SUFFIXES[engine]}"
        for program, call in row.get("_parts", []):
            task = fxc.Task(calibration=[call], inputs=lambda batch: batch)
            result = fxc.PassManager(pipeline).run(program, task)
            try:
                fxc.export(result.program, file)
            except fxc.FxCompressError:
                if reason := cannot_run(program, file):
                    return {f"{engine}_cannot": reason}
                raise
            executed += executed_layers(file)
            layers += result.records[-1].statistics["layers"]
            refusals |= {refusal.code for refusal in result.records[-1].result.refusals}
            with torch.no_grad():
                pair = [tree_leaves(p.emit()(*call[0], **call[1])) for p in (program, result.program)]
            floats = [[leaf for leaf in leaves if floating(leaf)] for leaves in pair]
            sqnr.append(compare_outputs(*floats).sqnr_db)
    if sqnr and min(sqnr) < LEAST_SQNR_DB:
        raise AssertionError(f"int8 is {min(sqnr):.1f} dB from floating point")
    integers = sum(layer.integer for layer in executed)
    return {
        f"{engine}_layers": layers, f"{engine}_integer": integers, f"{engine}_executed": len(executed),
        f"{engine}_sqnr_db": round(min(sqnr), 1) if sqnr else None, f"{engine}_refusals": sorted(refusals),
    }  # fmt: skip


def cannot_run(program: Any, file: Path) -> str | None:
    """Why an engine does not run the model in floating point, if so."""
    import fxcompress as fxc

    try:
        fxc.export(program, file)
    except fxc.FxCompressError as error:
        return str(error)
    return None


def floating(leaf: Any) -> bool:
    import torch

    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


CHECKS = {"capture": check_capture, "onnxruntime": check_onnxruntime, "openvino": check_openvino}
ISLAND_CHECKS = {"islands": check_islands, "onnxruntime": check_onnxruntime, "openvino": check_openvino}
