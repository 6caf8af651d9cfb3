"""Compressing what can be captured of a model that cannot be captured whole."""

import json

import pytest
import torch
from models import Detector, images
from torch import nn

import fxcompress as fxc
from fxcompress.cli import main
from fxcompress.engines.integers import is_quantized
from fxcompress.ir.program import Diagnostic
from fxcompress.pass_base import Refusal
from fxcompress.report import PassRow, Report
from fxcompress.report.islands import merged
from fxcompress.verification.numerics import Comparison


def detector():
    torch.manual_seed(0)
    return Detector().eval()


@pytest.fixture(scope="module")
def partial():
    return fxc.trace_islands(detector(), (images((16, 16)),))


@pytest.fixture(scope="module")
def out(partial):
    return fxc.compress(partial)


def test_islands_are_compressed_and_the_code_around_them_runs_as_before(out):
    assert not any(isinstance(module, nn.BatchNorm2d) for module in out.model.modules())
    with torch.no_grad():
        for expected, found in zip(
            detector()(images((24, 24), (9, 30))), out.model(images((24, 24), (9, 30))), strict=True
        ):
            torch.testing.assert_close(expected, found)


def test_the_report_covers_every_island_by_its_place_in_the_model(out):
    report = out.report
    assert report.title == "Detector"
    assert {row.name.split(".")[0] for row in report.layers} == {"backbone", "scorer", "head"}
    assert {row.name: row.status for row in report.layers}["backbone.1"] == "removed"
    assert [row.text for row in report.passes] == ["eliminate-dead", "fold-constants", "fold-batchnorm"]
    assert report.passes[2].counts == "folded 1"
    assert report.before.params == sum(each.numel() for each in detector().parameters())
    assert Report.from_json(report.to_json()) == report
    assert repr(out).startswith("Compressed(Detector: params ")


def test_the_metric_is_taken_of_the_whole_model(partial):
    def detections(module):
        return sum(len(found) for found in module(images((16, 16))))

    out = fxc.compress(partial, task=fxc.Task(evaluate=detections, metric="detections"))
    (measure,) = out.report.measures
    assert (measure.name, measure.before) == ("detections", measure.after)
    assert measure.before > 0


def input_scale(island):
    """The step of the first value that becomes integers."""
    return next(node.args[1] for node in island.nodes if "quantize_per_tensor" in str(node.target))


def test_islands_are_calibrated_on_what_the_model_calls_them_with(partial):
    batches = [images((16, 16), (14, 18)), images((20, 15))]
    out = fxc.compress(
        partial, pipeline="insert-qdq{least=3 vnni=true}", task=fxc.Task(calibration=batches, inputs=lambda b: (b,))
    )
    quantized = {path: is_quantized(island.graph_module) for path, island in out.program.islands.items()}
    assert quantized == {"backbone": True, "scorer": True, "head": True}
    scale = input_scale(out.program.islands["backbone"])
    largest = float(max(image.abs().max() for batch in batches for image in batch))
    assert scale == pytest.approx(largest / 127, rel=0.01)  # of all three images, and no other
    with torch.no_grad():
        for expected, found in zip(detector()(images((16, 16))), out.model(images((16, 16))), strict=True):
            torch.testing.assert_close(expected, found, atol=0.05, rtol=0.05)


class InPlace(nn.Module):
    """The code around the island writes into what it gave."""

    def __init__(self):
        super().__init__()
        self.block = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        if x.sum() > 1e9:
            raise ValueError("too bright")
        x = x.clone()
        y = self.block(x)
        return y + x.mul_(100)


def test_calibration_sees_what_islands_were_given_not_what_became_of_it():
    x = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    partial = fxc.trace_islands(InPlace().eval(), x)
    out = fxc.compress(partial, pipeline="insert-qdq{vnni=true}", task=fxc.Task(calibration=[x]))
    assert input_scale(out.program.islands["block"]) == pytest.approx(float(x.max()) / 255, rel=0.01)


class Rare(nn.Module):
    """Calls its second layer for bright images only."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        y = self.first(x)
        return self.second(y) if x.sum() > 100 else y


def test_an_island_that_no_calibration_batch_calls_is_named():
    partial = fxc.trace_islands(Rare().eval(), torch.ones(8, 3, 8, 8))
    with pytest.raises(
        fxc.InputError, match="no calibration batch makes Rare call its island 'second'; give"
    ) as caught:
        fxc.compress(partial, pipeline="insert-qdq", task=fxc.Task(calibration=[torch.zeros(8, 3, 8, 8)]))
    assert "training and loss of the task are of the whole" in caught.value.__notes__[-1]


def test_islands_have_no_training_of_their_own(partial):
    task = fxc.Task(training=[images((16, 16))], loss=lambda out, batch: out[0].sum())
    with pytest.raises(fxc.InputError) as caught:
        fxc.compress(partial, pipeline="train", task=task)
    assert "training and loss of the task are of the whole" in caught.value.__notes__[-1]


def test_calibration_batches_that_the_model_does_not_take(partial):
    task = fxc.Task(calibration=[[torch.randn(4, 7, 7)]], inputs=lambda batch: (batch,))
    with pytest.raises(fxc.InputError, match=r"Detector fails on calibration batch 0: .*channels"):
        fxc.compress(partial, pipeline="insert-qdq{least=1}", task=task)


def test_a_failing_pass_names_the_island(partial, monkeypatch):
    from fxcompress.passes.fold_batchnorm import FoldBatchnorm

    monkeypatch.setattr(FoldBatchnorm, "run", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        fxc.compress(partial, pipeline="fold-batchnorm")
    assert caught.value.__notes__[-1] == "in the island 'backbone'"


def test_inputs_are_those_it_was_captured_with(partial):
    with pytest.raises(fxc.InputError, match="a PartialProgram has its example inputs"):
        fxc.compress(partial, (images((16, 16)),))


def test_what_needs_a_whole_program_says_how_to_go_on(out, tmp_path):
    with pytest.raises(fxc.ArtifactError, match=r"not PartialProgram; .*each of the islands"):
        out.save(tmp_path / "detector.pt2")
    with pytest.raises(fxc.InputError, match="each of the islands of a PartialProgram"):
        fxc.export(out.model, tmp_path / "detector.onnx")
    assert list(tmp_path.iterdir()) == []


def test_an_island_can_be_saved_and_exported_by_itself(out, tmp_path):
    island = out.program.islands["backbone"]
    fxc.save(island, tmp_path / "backbone.pt2")
    fxc.export(island, tmp_path / "backbone.onnx")
    features = torch.randn(1, 3, 21, 34)
    with torch.no_grad():
        assert torch.equal(fxc.load(tmp_path / "backbone.pt2")(features), island(features))


def test_passes_of_all_islands_become_one_row_with_the_largest_error():
    def island(error, exact, refusals=()):
        row = PassRow("scale", 1.5, not exact, {"scaled": 2}, refusals, Comparison(error, error, 100.0, exact))
        return Report("Island", (), (row,), (Diagnostic("training-only", "drops", "drop"),))

    report = merged("Whole", {"a": island(0.0, True), "b.c": island(0.25, False, (Refusal("no", "conv", "why"),))}, ())
    (row,) = report.passes
    assert (row.seconds, row.changed, row.statistics) == (3.0, True, {"scaled": 4})
    assert row.comparison.max_rel_error == 0.25
    assert row.refusals == (Refusal("no", "b.c.conv", "why"),)
    assert [each.path for each in report.diagnostics] == ["a.drop", "b.c.drop"]


@pytest.fixture
def detector_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_detector.py").write_text(
        "import torch\nfrom models import Detector, images\n\n"
        "def build():\n    torch.manual_seed(0)\n    return Detector(), (images((16, 16)),)\n"
    )
    return "my_detector.py:build"


def test_the_command_line_takes_the_model_in_parts_and_says_so(detector_file, tmp_path, capsys):
    assert main(["compress", detector_file, "-o", "out"]) == 0
    text, notes = capsys.readouterr()
    assert notes.startswith("taken in parts: Detector cannot be captured at ")
    assert "3 islands: backbone, scorer, head\nleft in Python: the code around them\n" in text
    assert "model.pt2 and model.onnx are left out: the model was captured in part only" in text
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == ["report.html", "report.json"]
    assert "latency (eager, example inputs)" in {
        each["name"] for each in json.loads((tmp_path / "out" / "report.json").read_text())["measures"]
    }


def test_inspect_and_bench_show_each_part(detector_file, capsys):
    assert main(["inspect", detector_file]) == 0
    text, notes = capsys.readouterr()
    assert notes.startswith("taken in parts: Detector cannot be captured at ")
    headings = [line.partition(":")[0] for line in text.splitlines() if " params, " in line]
    assert len(headings) == 3
    assert "3 islands: backbone, scorer, head\nleft in Python: the code around them\n" in text
    assert main(["inspect", detector_file, "--graph"]) == 0
    assert f"{detector_file}, backbone" in capsys.readouterr().out
    assert main(["bench", detector_file, "--engine", "eager", "--rounds", "1"]) == 0
    text = capsys.readouterr().out
    for part in ("backbone", "scorer", "head"):
        assert f"{detector_file}, {part}, batch 1" in text
