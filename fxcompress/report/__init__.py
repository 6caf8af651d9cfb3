"""Reports: what a pipeline did to a model, as rows, text, JSON and HTML."""

from fxcompress.report.build import build_report
from fxcompress.report.model import Report
from fxcompress.report.rows import Figures, LayerFigures, LayerRow, Measure, PassRow, Status

__all__ = ["Figures", "LayerFigures", "LayerRow", "Measure", "PassRow", "Report", "Status", "build_report"]
