"""The report: what a pipeline did to a model, layer by layer and pass by pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike

from fxcompress.formatting import counted, measured
from fxcompress.ir.program import Diagnostic
from fxcompress.pass_base import Refusal
from fxcompress.report.rows import Figures, LayerRow, Measure, PassRow, Status
from fxcompress.staging import staged


@dataclass(frozen=True)
class Report:
    """A model before and after a pipeline.

    Printing it gives one line; :meth:`table` gives all of it as text, and notebooks show it as HTML.

    Attributes:
        title: Name of the model.
        layers: One row per layer, in execution order; a removed layer stands where it was.
        passes: One row per pass, in the order they ran.
        diagnostics: What to know about how the model was read.
        measures: What was measured on both models, such as accuracy, latency and file sizes; add them with
            ``dataclasses.replace(report, measures=...)``.
        environment: Versions of what made the report.
    """

    title: str
    layers: tuple[LayerRow, ...]
    passes: tuple[PassRow, ...] = ()
    diagnostics: tuple[Diagnostic, ...] = ()
    measures: tuple[Measure, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def before(self) -> Figures:
        """Totals of the model before."""
        return Figures.of(row.before for row in self.layers)

    @cached_property
    def after(self) -> Figures:
        """Totals of the model after."""
        return Figures.of(row.after for row in self.layers)

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """What the passes matched and did not rewrite, in the order they ran."""
        return tuple(refusal for row in self.passes for refusal in row.refusals)

    @property
    def seconds(self) -> float:
        """Time in all passes."""
        return sum(row.seconds for row in self.passes)

    def count(self, status: Status) -> int:
        """Number of layers of that status."""
        return sum(row.status is status for row in self.layers)

    def totals(self) -> Iterator[Measure]:
        """The totals and what was measured, as rows of one table."""
        before, after = self.before, self.after
        yield Measure("params", before.params, after.params, "params")
        yield Measure("MACs", before.macs, after.macs, "MACs")
        yield Measure("weights", before.weight_bytes, after.weight_bytes, "B")
        yield Measure("activations", before.activation_bytes, after.activation_bytes, "B")
        yield from self.measures

    def table(self, depth: int | None = None) -> str:
        """The report as text: totals, layers, passes, refusals and diagnostics.

        Args:
            depth: Sums layers up by the first ``depth`` parts of their paths; one row per layer if not given.

        Raises:
            InputError: If ``depth`` is not positive.
        """
        from fxcompress.report.text import report_text

        return report_text(self, depth)

    def to_json(self) -> str:
        """The report as JSON, with the version of its schema."""
        from fxcompress.report.schema import dumps

        return dumps(self)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that :meth:`to_json` wrote.

        Raises:
            ArtifactError: If the text is no report, or one of a newer version.
        """
        from fxcompress.report.schema import loads

        return loads(text)

    def to_html(self, path: str | PathLike[str]) -> None:
        """Writes the report as one HTML file that needs nothing else and loads nothing.

        Raises:
            ArtifactError: If the file cannot be written; a file that was there stays as it was.
        """
        from fxcompress.report.html import page

        with staged(path) as file:
            file.write_text(page(self), encoding="utf-8")

    def _repr_html_(self) -> str:
        from fxcompress.report.html import fragment

        return fragment(self)

    def __repr__(self) -> str:
        totals = [(row.name, *measured(row.before, row.after, row.unit)) for row in self.totals()]
        parts = [f"{name} {before} -> {after} ({change})" for name, before, after, change in totals[:2]]
        for status in (Status.CHANGED, Status.REMOVED, Status.ADDED):
            if self.count(status):
                parts.append(f"{self.count(status)} {status}")
        if self.refusals:
            parts.append(counted(len(self.refusals), "refusal"))
        return f"Report({self.title}: {', '.join(parts)})"
