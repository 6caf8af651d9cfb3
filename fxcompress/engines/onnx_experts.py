"""Products of groups of rows with a matrix for each (mixtures of experts) in ONNX, which has no operator for them."""

from __future__ import annotations

from typing import Any

from torch.export import ExportedProgram

_GROUPED = ("aten::_grouped_mm", "transformers::grouped_mm_fallback")
"""Operators of ``(rows, inputs)``, ``(groups, inputs, outputs)`` and the row behind each group, in order."""


def expert_translations(exported: ExportedProgram) -> dict[Any, Any]:
    """Translations for ``torch.onnx.export`` of the grouped products of a graph; none for others."""
    targets = {node.target for node in exported.graph.nodes if node.op == "call_function"}
    return {target: _grouped_product for target in targets if _schema_name(target) in _GROUPED}


def _schema_name(target: Any) -> str:
    return str(getattr(getattr(target, "_schema", None), "name", ""))


def _grouped_product(rows: Any, matrices: Any, ends: Any, *options: Any) -> Any:
    """All rows by each matrix, those of other groups as 0: no shape depends on how rows are shared out."""
    from onnxscript import opset18

    op: Any = opset18
    ends = op.Unsqueeze(op.CastLike(ends, op.Shape(rows)), [1])  # (groups, 1)
    place = op.Range(0, op.Squeeze(op.Shape(rows, start=0, end=1)), 1)
    before_end = op.CastLike(op.Less(place, ends), rows)  # (groups, rows)
    before_start = op.Pad(before_end, [1, 0, -1, 0])
    inside = op.Unsqueeze(op.Sub(before_end, before_start), [2])
    return op.ReduceSum(op.MatMul(op.Mul(rows, inside), matrices), [0], keepdims=0)
