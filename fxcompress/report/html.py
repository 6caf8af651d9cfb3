"""The report as HTML: a page that stands alone, and a fragment for notebooks."""

from __future__ import annotations

from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined

from fxcompress import formatting
from fxcompress.report.charts import HEIGHT, WIDTH, charts, shares
from fxcompress.report.model import Report
from fxcompress.report.rows import Status

_QUANTITIES = (
    ("params", "params", formatting.PARAMS.text),
    ("MACs", "macs", formatting.MACS.text),
    ("weights", "weight_bytes", formatting.BYTES.text),
    ("activations", "activation_bytes", formatting.BYTES.text),
)
"""Column header, field of a layer's figures, and how it is written."""


def page(report: Report) -> str:
    """A whole HTML document with its styles, its script and its charts inside."""
    return _render("page.html.j2", report)


def fragment(report: Report) -> str:
    """Tables for a notebook cell."""
    return _render("fragment.html.j2", report)


def _render(template: str, report: Report) -> str:
    return (
        _environment()
        .get_template(template)
        .render(
            report=report,
            charts=charts(report.layers),
            shares=shares(report.layers),
            chart_width=WIDTH,
            chart_height=HEIGHT,
            statuses=[(status, report.count(status)) for status in Status if report.count(status)],
            quantities=_QUANTITIES,
        )
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("fxcompress.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        counted=formatting.counted, measured=formatting.measured, relative_change=formatting.relative_change
    )
    environment.filters["seconds"] = formatting.seconds
    return environment
