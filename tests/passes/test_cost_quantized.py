"""cost of quantized models: a layer keeps its row, and counts the integers that it holds."""

import pytest
import torch
from models import residual_net
from torch import nn

from fxcompress import PassManager, Task, trace
from fxcompress.report import build_report


def quantized(model, x, pipeline):
    torch.manual_seed(0)
    return PassManager(pipeline).run(trace(model.eval(), x[:2]), Task(calibration=[x]))


def rows(program):
    return {row.name: row for row in program.analyze("cost").layers}


def convolutions():
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 6, 1), nn.Softmax(1))


IMAGES = torch.randn(8, 4, 10, 10, generator=torch.Generator().manual_seed(1))


def test_weights_count_as_integers_and_their_scales():
    found = rows(quantized(convolutions(), IMAGES, "insert-qdq").program)
    assert list(found) == ["0", "3"]
    assert [row.kind for row in found.values()] == ["Conv2d W8A8", "Conv2d W8A8"]
    grid = 4 + 1  # a scale and a zero point for each channel
    assert found["0"].weight_bytes == 8 * 4 * 9 + 8 * grid + 4 * 8
    assert found["0"].params == 8 * 4 * 9 + 8
    assert found["0"].macs == rows(trace(convolutions().eval(), IMAGES[:2]))["0"].macs


def test_what_only_integers_are_made_of_counts_as_integers():
    before = rows(trace(convolutions().eval(), IMAGES[:2]))
    after = rows(quantized(convolutions(), IMAGES, "insert-qdq").program)
    assert after["3"].activation_bytes == before["3"].activation_bytes
    chain = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 1))
    found = rows(quantized(chain, IMAGES, "insert-qdq").program)
    assert found["0"].activation_bytes == 8 * 8 * 8
    assert found["2"].activation_bytes == 6 * 8 * 8 * 4


@pytest.mark.parametrize(
    ("pipeline", "kind", "size"),
    [
        ("quantize-weights", "Linear W8", 32 * 8 + 8 * 5),
        ("quantize-weights{bits=4}", "Linear W4", 32 * 8 + 8 * 5),
        ("quantize-weights{bits=4 group-size=16}", "Linear W4", 32 * 8 // 2 + 16 * 5),
        ("quantize-dynamic", "Linear W8A8", 32 * 8 + 8 * 5),
        ("insert-qdq{vnni=true weight-bits=7}", "Linear W7A8", 32 * 8 + 8 * 5),
    ],
)
def test_bits(pipeline, kind, size):
    program = quantized(nn.Sequential(nn.Linear(32, 8, bias=False)), torch.randn(8, 32), pipeline).program
    (row,) = rows(program).values()
    assert (row.name, row.kind, row.weight_bytes) == ("0", kind, size)


def test_a_weight_that_two_layers_share_counts_once():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 8, bias=False))
    model[2].weight = model[0].weight
    found = rows(quantized(model, torch.randn(8, 8), "quantize-weights").program)
    assert [row.weight_bytes for row in found.values()] == [64 + 8 * 5, 0]


def test_the_report_has_a_row_for_each_layer_as_before():
    done = quantized(residual_net(), torch.randn(8, 3, 8, 8), "fold-batchnorm,insert-qdq{vnni=true}")
    report = build_report(done.before, done.program, done.records)
    statuses = {row.name: str(row.status) for row in report.layers}
    assert {name for name, status in statuses.items() if status == "removed"} == {n for n in statuses if "bn" in n} | {
        "0.shortcut.1", "1.shortcut.1"
    }  # fmt: skip
    assert "added" not in statuses.values()
