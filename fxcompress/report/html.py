"""The report as HTML: a page that stands alone, and a fragment for notebooks."""

from __future__ import annotations

import os
import tempfile
from functools import cache
from os import PathLike
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from fxcompress.errors import ArtifactError
from fxcompress.report import formatting
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


def write(text: str, path: str | PathLike[str]) -> None:
    """Writes a text file in one step: what was there stays whole until the new file is.

    Raises:
        ArtifactError: If the file cannot be written.
    """
    target = Path(path)
    temporary: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=target.parent, prefix=f".{target.name}.", suffix=".tmp", delete=False
        ) as file:
            temporary = Path(file.name)
            file.write(text)
        temporary.chmod(0o666 & ~_umask())  # a temporary file is private, a report is not
        os.replace(temporary, target)
    except OSError as error:
        raise ArtifactError(
            f"cannot write the report to {target}: {error.strerror or error}; give a file in a folder that exists and "
            "can be written"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    """The process's umask, which can be read only by setting it."""
    current = os.umask(0o022)
    os.umask(current)
    return current
