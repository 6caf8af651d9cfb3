"""Reports as HTML: well formed, complete, self-contained, and safe whatever the names are."""

import os
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from reports import figures, tiny_report

from fxcompress.errors import ArtifactError
from fxcompress.ir.program import Diagnostic
from fxcompress.pass_base import Refusal
from fxcompress.report import LayerRow, Measure, PassRow, Report
from fxcompress.report.charts import charts, shares

INJECTION = "<script>alert('x')</script>&\""


@pytest.fixture
def report():
    return tiny_report()


VOID = {"meta", "input", "br", "hr", "img", "link"}


class Page(HTMLParser):
    """Checks that tags nest, and collects texts and attributes."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self):
        return " ".join("".join(self.texts).split())


@pytest.fixture
def html(report, tmp_path):
    report.to_html(tmp_path / "report.html")
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_html_is_well_formed_and_holds_everything(report, html):
    text = Page(html).text
    for row in report.layers:
        assert row.name in text
        assert row.note in text
    for refusal in report.refusals:
        assert refusal.reason in text
    for row in report.passes:
        assert row.text in text
        assert row.error in text
    assert report.diagnostics[0].message in text
    assert "97.10 % from 97.50 % -0.40 points" in text
    assert "216 → 112" in text
    assert "torch 2.15.0" in text


def test_html_loads_nothing(html):
    page = Page(html)
    assert "http:" not in html
    assert "https:" not in html
    assert "url(" not in html
    assert "@import" not in html
    assert {"link", "img", "iframe", "object"}.isdisjoint(page.tags)
    assert {"src", "href", "xlink:href"}.isdisjoint(name for name, _ in page.attributes)
    assert dict(page.attributes)["content"].startswith("default-src 'none';")


def test_html_draws_each_quantity_before_and_after(report, html):
    drawn = charts(report.layers)
    assert [chart.title for chart in drawn] == ["MACs per layer", "Parameters per layer", "Weight bytes per layer"]
    assert [column.label for column in drawn[0].columns] == [
        "stem.conv: 6.91 k → 3.46 k (changed)",
        "scale: 0 → 40 (added)",
        "head: 2.58 M (kept)",
    ]
    assert drawn[0].columns[0].after == drawn[0].columns[0].before / 2
    assert Page(html).tags.count("svg") == len(drawn) + len(shares(report.layers).bars)


def test_shares_add_up_and_the_smallest_kinds_are_summed_up():
    rows = [LayerRow(f"l{i}", figures(f"Kind{i}", params=2**i, macs=1), figures(f"Kind{i}", macs=1)) for i in range(9)]
    found = shares(rows)
    assert found.kinds[-1] == "other"
    assert len(found.kinds) == 6
    assert [name for name, _ in found.bars] == ["MACs before", "MACs after", "params before"]
    for _, segments in found.bars:
        assert sum(segment.width for segment in segments) == pytest.approx(100)


@pytest.mark.parametrize("where", ["page", "notebook"])
def test_names_are_text_and_never_markup(report, tmp_path, where):
    hostile = replace(
        report,
        title=INJECTION,
        layers=(LayerRow(INJECTION, figures(INJECTION, params=3, macs=3), None, INJECTION),),
        passes=(PassRow(INJECTION, 0.0, False, {INJECTION: 1}, (Refusal(INJECTION, INJECTION, INJECTION),)),),
        diagnostics=(Diagnostic(INJECTION, INJECTION, INJECTION),),
        measures=(Measure(INJECTION, 1.0, 2.0, INJECTION),),
        environment={INJECTION: INJECTION},
    )
    hostile.to_html(tmp_path / "report.html")
    text = {"page": (tmp_path / "report.html").read_text(encoding="utf-8"), "notebook": hostile._repr_html_()}[where]
    page = Page(text)
    assert page.tags.count("script") == {"page": 1, "notebook": 0}[where]
    assert INJECTION in page.text


def test_a_notebook_shows_the_totals_and_every_layer(report):
    page = Page(report._repr_html_())
    assert all(row.name in page.text for row in report.layers)
    assert "MACs2.59 M2.58 M-0.1 %" in page.text


def test_a_report_with_nothing_in_it_still_has_every_form(tmp_path):
    empty = Report("Nothing", ())
    empty.to_html(tmp_path / "empty.html")
    assert "Nothing that matched was refused." in Page((tmp_path / "empty.html").read_text(encoding="utf-8")).text
    assert Page(empty._repr_html_()).text.startswith("Nothing")
    assert "params" in empty.table()
    assert Report.from_json(empty.to_json()) == empty


def test_an_unwritable_path_is_one_clear_error(report, tmp_path):
    with pytest.raises(ArtifactError, match=r"cannot write .*report\.html: the directory .*missing does not exist"):
        report.to_html(tmp_path / "missing" / "report.html")
    with pytest.raises(ArtifactError, match="it is a directory"):
        report.to_html(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_failed_write_leaves_the_file_that_was_there(report, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    path = tmp_path / "report.html"
    path.write_text("before")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ArtifactError, match="No space left"):
        report.to_html(path)
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["report.html"]
