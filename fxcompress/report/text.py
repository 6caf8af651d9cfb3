"""The report as text: tables for a terminal or a log."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from tabulate import tabulate

from fxcompress.errors import InputError
from fxcompress.formatting import BYTES, MACS, PARAMS, arrow, counted, measured, seconds
from fxcompress.report.model import Report
from fxcompress.report.rows import Figures, LayerFigures, LayerRow, Status


def report_text(report: Report, depth: int | None = None) -> str:
    """Totals, layers, passes, refusals and diagnostics; ``depth`` sums layers up as in :meth:`Report.table`."""
    rows = report.layers if depth is None else by_depth(report.layers, depth)
    parts = [report.title, _totals(report), _layers(rows)]
    if report.passes:
        parts.append(_passes(report))
    parts += _listed("Refusals", report.refusals)
    parts += _listed("Diagnostics", report.diagnostics)
    return "\n\n".join(parts)


def by_depth(rows: Iterable[LayerRow], depth: int) -> Sequence[LayerRow]:
    """One row for layers that share the first ``depth`` parts of their paths, where the first of them stood.

    Raises:
        InputError: If ``depth`` is not positive.
    """
    if not isinstance(depth, int) or depth < 1:
        raise InputError(f"the depth of a report's table is {depth!r}; give a positive number, or None for every layer")
    groups: dict[str, list[LayerRow]] = {}
    for row in rows:
        groups.setdefault(".".join(row.path.split(".")[:depth]), []).append(row)
    return [_summed(name, members) for name, members in groups.items()]


def _summed(name: str, rows: Sequence[LayerRow]) -> LayerRow:
    if len(rows) == 1 and rows[0].path == name:
        return rows[0]
    statuses = Counter(row.status for row in rows)
    note = ", ".join(f"{statuses[status]} {status}" for status in Status if statuses[status])
    before, after = _sum([row.before for row in rows]), _sum([row.after for row in rows])
    return LayerRow(name, before, after, note if set(statuses) != {Status.KEPT} else "", path=name)


def _sum(costs: Sequence[LayerFigures | None]) -> LayerFigures | None:
    """Costs of several layers as one, which gives out what the last of them gives out."""
    there = [cost for cost in costs if cost is not None]
    if not there:
        return None
    total, kind = Figures.of(there), counted(len(there), "layer") if len(there) > 1 else there[0].kind
    return LayerFigures(**vars(total), kind=kind, output_shape=there[-1].output_shape, dtype=there[-1].dtype)


def _totals(report: Report) -> str:
    rows = [[row.name, *measured(row.before, row.after, row.unit)] for row in report.totals()]
    return _table(["", "before", "after", "change"], rows, "lrrr")


def _layers(rows: Iterable[LayerRow]) -> str:
    headers = ["layer", "status", "kind", "output", "params", "MACs", "weights", "note"]
    return _table(headers, [_layer(row) for row in rows], "llllrrrl")


def _layer(row: LayerRow) -> list[str]:
    def cell(write: Callable[[LayerFigures], str]) -> str:
        return arrow(*(None if side is None else write(side) for side in (row.before, row.after)))

    return [
        row.name,
        row.status,
        cell(lambda side: side.kind),
        cell(lambda side: side.shape),
        cell(lambda side: PARAMS.text(side.params)),
        cell(lambda side: MACS.text(side.macs)),
        cell(lambda side: BYTES.text(side.weight_bytes)),
        row.note,
    ]


def _passes(report: Report) -> str:
    rows = [
        [row.text, seconds(row.seconds), "yes" if row.changed else "no", row.counts, len(row.refusals), row.error]
        for row in report.passes
    ]
    return _table(["pass", "time", "changed", "did", "refusals", "error"], rows, "lrllrl")


def _listed(title: str, items: Sequence[object]) -> list[str]:
    return ["\n".join([title, *(f"  {item}" for item in items)])] if items else []


def _table(headers: list[str], rows: Iterable[Sequence[object]], align: str) -> str:
    columns = {"l": "left", "r": "right"}
    text = tabulate(rows, headers, disable_numparse=True, colalign=[columns[letter] for letter in align])
    return "\n".join(line.rstrip() for line in text.splitlines())
