"""The report as JSON. Totals are written for readers, and computed from the layers when read back."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, TypeVar

from fxcompress.errors import ArtifactError
from fxcompress.ir.program import Diagnostic
from fxcompress.pass_base import Refusal
from fxcompress.report.model import Report
from fxcompress.report.rows import LayerFigures, LayerRow, Measure, PassRow
from fxcompress.verification.numerics import Comparison

SCHEMA = "fxcompress-report"
VERSION = 1
"""Raised whenever a reader of the old version would misread the new one."""

T = TypeVar("T")


def dumps(report: Report) -> str:
    """The report as strict JSON; infinite numbers, which JSON lacks, are written as strings."""
    document = {
        "schema": SCHEMA,
        "version": VERSION,
        "title": report.title,
        "totals": {"before": asdict(report.before), "after": asdict(report.after)},
        "measures": list(map(asdict, report.measures)),
        "layers": [{**asdict(row), "status": row.status} for row in report.layers],
        "passes": list(map(asdict, report.passes)),
        "diagnostics": list(map(asdict, report.diagnostics)),
        "environment": dict(report.environment),
    }
    return json.dumps(_finite(document), indent=1, ensure_ascii=False, allow_nan=False)


def loads(text: str) -> Report:
    """The report in a JSON text.

    Raises:
        ArtifactError: If the text is no report, or one of a newer version.
    """
    try:
        document = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise ArtifactError(f"the report is not JSON: {error}; give what Report.to_json() wrote") from error
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise ArtifactError(f"the JSON is not a report (no schema {SCHEMA!r}); give what Report.to_json() wrote")
    found = document.get("version")
    if found != VERSION:
        raise ArtifactError(
            f"the report has version {found!r} of the schema, and this fxcompress reads version {VERSION}; "
            "read it with the fxcompress that wrote it, or a newer one"
        )
    try:
        return _report(document)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"the report is damaged ({type(error).__name__}: {error}); write it again with Report.to_json()"
        ) from error


def _report(document: Mapping[str, Any]) -> Report:
    return Report(
        title=str(document["title"]),
        layers=tuple(map(_layer, document["layers"])),
        passes=tuple(map(_pass, document["passes"])),
        diagnostics=tuple(Diagnostic(**item) for item in document["diagnostics"]),
        measures=tuple(map(_measure, document["measures"])),
        environment={str(name): str(value) for name, value in document["environment"].items()},
    )


def _layer(item: Mapping[str, Any]) -> LayerRow:
    return LayerRow(
        name=str(item["name"]),
        before=_maybe(_figures, item["before"]),
        after=_maybe(_figures, item["after"]),
        note=str(item["note"]),
        path=str(item["path"]),
    )


def _figures(item: Mapping[str, Any]) -> LayerFigures:
    return LayerFigures(
        params=int(item["params"]),
        macs=int(item["macs"]),
        weight_bytes=int(item["weight_bytes"]),
        activation_bytes=int(item["activation_bytes"]),
        kind=str(item["kind"]),
        output_shape=tuple(map(int, item["output_shape"])),
        dtype=str(item["dtype"]),
    )


def _pass(item: Mapping[str, Any]) -> PassRow:
    return PassRow(
        text=str(item["text"]),
        seconds=float(item["seconds"]),
        changed=bool(item["changed"]),
        statistics={str(name): _number(value) for name, value in item["statistics"].items()},
        refusals=tuple(Refusal(**refusal) for refusal in item["refusals"]),
        comparison=_maybe(_comparison, item["comparison"]),
    )


def _comparison(item: Mapping[str, Any]) -> Comparison:
    return Comparison(
        float(item["max_abs_error"]),
        float(item["max_rel_error"]),
        float(item["sqnr_db"]),
        bool(item["exact"]),
        float(item.get("discrete_changed", 0.0)),
    )


def _measure(item: Mapping[str, Any]) -> Measure:
    return Measure(
        str(item["name"]), _maybe(_number, item["before"]), _maybe(_number, item["after"]), str(item["unit"])
    )


def _number(value: Any) -> int | float:
    return value if isinstance(value, int) else float(value)


def _maybe(read: Callable[[Any], T], value: Any) -> T | None:
    return None if value is None else read(value)


def _finite(value: Any) -> Any:
    """``value`` with infinities and NaN as the strings that ``float`` reads back."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
