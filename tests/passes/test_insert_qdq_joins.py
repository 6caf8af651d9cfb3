"""insert-qdq where values are joined: one scale for all of them, unless their ranges are far apart."""

import pytest
import torch
from quantizing import quantized
from torch import nn

import fxcompress as fxc
from fxcompress.verification.numerics import compare

TARGETS = ("openvino", "onnxruntime", "executorch")


class Joined(nn.Module):
    """Two convolutions of one image, one of them times a number, joined."""

    def __init__(self, times):
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 4, 1)
        with torch.no_grad():
            self.second.weight *= times
            self.second.bias *= times

    def forward(self, x):
        return self.last(torch.cat([self.first(x).relu(), self.second(x).relu()], 1))


def joined(times, target):
    torch.manual_seed(0)
    model, x = Joined(times).eval(), torch.randn(8, 3, 8, 8)
    program = fxc.trace(model, x)
    done = fxc.PassManager(f"insert-qdq{{target={target}}}").run(program, fxc.Task(calibration=[x]))
    scales = {
        node.args[1]
        for node in done.program.nodes
        if "dequantize_per_tensor" in node.name and any("cat" in user.name for user in node.users)
    }
    return program, done.program, done.records[0].result.refusals, scales


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("times", [1, 4])
def test_near_ranges_have_one_scale(target, times):
    _, _, refusals, scales = joined(times, target)
    assert not refusals
    assert len(scales) == 1


@pytest.mark.parametrize("target", TARGETS)
def test_ranges_far_apart_do_not(target):
    before, after, refusals, scales = joined(100, target)
    (refusal,) = refusals
    assert (refusal.code, refusal.node) == ("ranges-apart", "cat")
    assert "times as much as" in refusal.reason
    assert len(scales) != 1
    assert compare(before, after).sqnr_db > 30


def test_zeros_need_no_scale_of_their_own():
    _, _, refusals, scales = joined(0, "onnxruntime")
    assert not refusals
    assert len(scales) == 1


@pytest.mark.parametrize(("target", "suffix"), [("onnxruntime", ".onnx"), ("openvino", ".xml")])
def test_joins_of_several_scales_run(target, suffix, tmp_path):
    torch.manual_seed(0)
    program = quantized(Joined(100), torch.randn(8, 3, 8, 8), target)
    assert fxc.export(program, tmp_path / f"m{suffix}").max_relative_error < 0.05


class Stream(nn.Module):
    """Sums whose results a layer and a norm read, and at the end a layer alone."""

    def __init__(self):
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.norms = nn.ModuleList(nn.GroupNorm(1, 8) for _ in range(2))
        self.layers = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(4))

    def forward(self, x):
        x = self.stem(x)
        for norm, first, second in zip(self.norms, self.layers[::2], self.layers[1::2], strict=True):
            x = x + first(norm(x)) + second(x)
        return self.last(x)


@pytest.mark.parametrize("target", TARGETS)
def test_a_stream_that_is_also_read_in_floating_point_is_not_rounded_at_each_sum(target):
    after = quantized(Stream(), torch.randn(8, 3, 8, 8), target)
    (norm,) = (node for node in after.nodes if node.name == "norms_1")
    (last,) = (node for node in after.nodes if node.name == "last")
    assert [source.name for source in norm.all_input_nodes][:1] == ["add_1"]
    assert "dequantize" in last.all_input_nodes[0].name
    assert any("quantize" in user.name for user in norm.all_input_nodes[0].users), "a layer reads it too"
