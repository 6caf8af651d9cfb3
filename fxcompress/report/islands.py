"""One report on a model that was compressed island by island."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from fxcompress.ir.program import Diagnostic
from fxcompress.pass_base import Refusal
from fxcompress.report.model import Report
from fxcompress.report.rows import LayerRow, PassRow


def merged(title: str, islands: Mapping[str, Report], diagnostics: Iterable[Diagnostic] = ()) -> Report:
    """The reports of islands that the same pipeline ran on as one, everything named by its place in the whole model.

    Args:
        title: Name of the whole model.
        islands: Qualified name of each island -> its report; at least one.
        diagnostics: What to know about the code around the islands.
    """
    inner = [_placed(item, path) for path, report in islands.items() for item in report.diagnostics]
    return Report(
        title=title,
        layers=tuple(_layer(row, path) for path, report in islands.items() for row in report.layers),
        passes=tuple(
            _pass([*islands], rows) for rows in zip(*(report.passes for report in islands.values()), strict=True)
        ),
        diagnostics=tuple(dict.fromkeys([*diagnostics, *inner])),
        environment=next(iter(islands.values())).environment,
    )


def _layer(row: LayerRow, path: str) -> LayerRow:
    return replace(row, name=f"{path}.{row.name}", path=f"{path}.{row.path}")


def _placed(item: Diagnostic, path: str) -> Diagnostic:
    return replace(item, path=f"{path}.{item.path}" if item.path else path)


def _pass(paths: Sequence[str], rows: Sequence[PassRow]) -> PassRow:
    """What one pass did on all islands, with the largest of its numeric errors."""
    statistics: dict[str, int | float] = {}
    for row in rows:
        for name, count in row.statistics.items():
            statistics[name] = statistics.get(name, 0) + count
    compared = [row.comparison for row in rows if row.comparison is not None]
    return PassRow(
        text=rows[0].text,
        seconds=sum(row.seconds for row in rows),
        changed=any(row.changed for row in rows),
        statistics=statistics,
        refusals=tuple(_refusal(each, path) for path, row in zip(paths, rows, strict=True) for each in row.refusals),
        comparison=max(compared, key=lambda found: (not found.exact, found.max_rel_error), default=None),
    )


def _refusal(refusal: Refusal, path: str) -> Refusal:
    return replace(refusal, node=f"{path}.{refusal.node}")
