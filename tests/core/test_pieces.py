"""Quantized files are right piece by piece, and engines stay near them."""

from dataclasses import dataclass
from typing import NamedTuple

import onnx
import pytest
import torch
from models import residual_net
from onnx import numpy_helper
from quantizing import ENGINES, quantized, spoil_engine, spoil_weights
from torch import nn

import fxcompress as fxc
from fxcompress.engines import export, openvino_format, pieces
from fxcompress.engines.formats import FORMATS, Format
from fxcompress.engines.names import Pieces
from fxcompress.engines.pieces import PieceCheck, Rounded, check_rounded, cut_names


@pytest.fixture(scope="module")
def programs():
    torch.manual_seed(0)
    model, x = residual_net(), torch.randn(8, 3, 8, 8)
    return {target: quantized(model, x, target) for target in ENGINES}


@pytest.fixture(scope="module")
def right(programs, tmp_path_factory):
    """The ONNX file of each, as it should be."""
    folder = tmp_path_factory.mktemp("right")
    return {target: fxc.export(program, folder / f"{target}.onnx").path for target, program in programs.items()}


@pytest.mark.parametrize("target", ENGINES)
def test_engines_stay_near_a_file_that_is_right(target, programs, tmp_path):
    for suffix in {ENGINES[target], ".pt2"}:
        fxc.export(programs[target], tmp_path / f"m{suffix}")


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.last(self.conv(x).sigmoid())


def test_what_may_be_rounded_either_way_is_known(monkeypatch):
    program = quantized(Gate(), torch.zeros(8, 3, 8, 8), "onnxruntime")
    module, interface = program.emit().eval(), program.interface
    with torch.no_grad():
        module.conv.bias.zero_()  # all values are sigmoid(0) = 0.5, and the step puts that on an edge
    for node in module.graph.nodes:
        if "quantize_per_tensor" in str(node.target) and node.args[1] != 1.0:
            node.args = (node.args[0], 1 / 3, *node.args[2:])
    module.recompile()
    points = {}
    monkeypatch.setattr(pieces, "check_rounded", lambda expected, found: points.update(expected))
    check = PieceCheck(module, cut_names(module, {}), Pieces({}, lambda *given: {}))
    check.outputs(interface, ((torch.zeros(2, 3, 8, 8),), {}), ())
    assert [bool(point.on_edge.all()) for point in points.values()] == [False, False, True, False]


def test_values_on_the_edge_between_two_integers_may_become_either():
    on_edge = torch.arange(100) < 30
    points = {"a": Rounded(torch.zeros(100), 0.5, on_edge)}
    check_rounded(points, {"a": 0.5 * on_edge})
    check_rounded(points, {"a": 0.5 * (torch.arange(100) == 99)})
    with pytest.raises(fxc.VerificationError, match="a differs from the model in 2 of 100 values, by up to 1 steps"):
        check_rounded(points, {"a": 0.5 * (torch.arange(100) > 97)})
    with pytest.raises(fxc.VerificationError, match="a differs from the model in 30 of 100 values, by up to 2 steps"):
        check_rounded(points, {"a": 1.0 * on_edge})


@pytest.fixture
def one_by_one(monkeypatch):
    """Every value is compared as soon as it is there, as where values are large."""
    monkeypatch.setattr(pieces, "_AT_ONCE", 0)


@pytest.mark.parametrize("target", ENGINES)
def test_values_are_compared_as_they_come_and_held_until_they_are_read(target, programs, tmp_path, monkeypatch):
    held, compared = [], []
    check, drop = pieces.check_rounded, PieceCheck._check

    def counted(self, outputs=()):
        given = drop(self, outputs)
        held.append(len(self._held))
        return given

    monkeypatch.setattr(pieces, "_AT_ONCE", 0)
    monkeypatch.setattr(pieces, "check_rounded", lambda *values: (check(*values), compared.append(len(values[1]))))
    monkeypatch.setattr(PieceCheck, "_check", counted)
    fxc.export(programs[target], tmp_path / f"m{ENGINES[target]}")
    assert set(compared) == {0, 1}
    assert sum(compared) > 10
    assert max(held) == 2, "a block and its shortcut"
    assert held[-1] == 0


@pytest.mark.parametrize("target", ENGINES)
def test_a_file_that_is_off_in_a_piece_of_many(target, programs, right, tmp_path, monkeypatch, one_by_one):
    test_a_file_that_is_off_a_little_is_not_written(scale_of_a_weight, target, programs, right, tmp_path, monkeypatch)


class Various(nn.Module):
    """Gives a value that a quantizer makes, beside one that none does, and things that are no tensors."""

    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = self.conv(x).relu()
        return {"last": self.last(x), "shape": x.shape[0], "both": [x, None]}


@dataclass
class Both:
    second: torch.Tensor
    first: torch.Tensor


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


class Structured(Various):
    """Gives the same in a structure that Python has no literal for."""

    def __init__(self, structure):
        super().__init__()
        self.structure = structure

    def forward(self, x):
        given = super().forward(x)
        return self.structure(given["both"][0], given["last"])


@pytest.mark.parametrize("target", ENGINES)
@pytest.mark.parametrize(
    "model",
    [
        Various(),
        Structured(Both),
        Structured(lambda first, second: (Pair(second, first), second.shape, None, first + 1)),
        Structured(lambda first, second: (first, first, second, second)),
    ],
    ids=["no tensors", "dataclass", "namedtuple", "twice"],
)
def test_structures_of_outputs(model, target, tmp_path, one_by_one):
    program = quantized(model, torch.randn(8, 3, 8, 8), target)
    assert fxc.export(program, tmp_path / f"m{ENGINES[target]}").max_relative_error < 0.02


@pytest.mark.parametrize("target", ENGINES)
def test_quantizers_of_other_tools(target, programs, tmp_path, one_by_one):
    """One quantizer may have a dequantizer for each reader, and there may be some that nobody reads."""
    module = programs[target].emit()
    graph, dequantize = module.graph, torch.ops.quantized_decomposed.dequantize_per_tensor.default
    several = [node for node in graph.find_nodes(op="call_function", target=dequantize) if len(node.users) > 1]
    assert several
    for node in several:
        for user in list(node.users)[1:]:
            with graph.inserting_before(user):
                user.replace_input_with(node, graph.call_function(dequantize, node.args))
        with graph.inserting_before(node):
            graph.call_function(dequantize, node.args)
    module.recompile()
    fxc.export(module, tmp_path / f"m{ENGINES[target]}")


def test_a_value_that_is_an_output_has_its_name_in_the_file():
    module = quantized(Various(), torch.randn(8, 3, 8, 8), "onnxruntime").emit()
    assert list(cut_names(module, {0: "last", 2: "both"}).values()) == ["dequantize_per_tensor", "both", "last"]


# --- planted bugs ----------------------------------------------------------------------------------------------------


def quantizers(model, kind):
    return [node for node in model.graph.node if node.op_type == kind]


def held(model, name):
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def own(model, node, index, change):
    """Gives a node an operand of its own, changed."""
    tensor = numpy_helper.from_array(change(numpy_helper.to_array(held(model, node.input[index]))), f"planted_{index}")
    model.graph.initializer.append(tensor)
    node.input[index] = tensor.name


def scale_of_an_activation(model):
    own(model, quantizers(model, "QuantizeLinear")[2], 1, lambda scale: scale * 1.03)


def scale_where_it_is_read(model):
    reader = next(node for node in quantizers(model, "DequantizeLinear") if node.input[0].startswith("quantize_per"))
    own(model, reader, 1, lambda scale: scale * 0.97)


def scale_of_a_weight(model):
    reader = next(node for node in quantizers(model, "DequantizeLinear") if "weight" in node.input[0])
    own(model, reader, 1, lambda scales: scales * 1.03)


def zero_point(model):
    own(model, quantizers(model, "QuantizeLinear")[1], 2, lambda zero: zero + 1)


def channel_axis(model):
    for node in quantizers(model, "DequantizeLinear"):
        if "weight" in node.input[0] and len(set(held(model, node.input[0]).dims[:2])) == 1:
            node.attribute[0].i = 1
            return
    raise AssertionError("no weight is square")


def one_scale_for_all_channels(model):
    reader = next(node for node in quantizers(model, "DequantizeLinear") if "weight" in node.input[0])
    own(model, reader, 1, lambda scales: scales * 0 + scales.mean())


BUGS = [
    scale_of_an_activation,
    scale_where_it_is_read,
    scale_of_a_weight,
    zero_point,
    channel_axis,
    one_scale_for_all_channels,
]


@pytest.mark.parametrize("target", ENGINES)
@pytest.mark.parametrize("bug", BUGS)
def test_a_file_that_is_off_a_little_is_not_written(bug, target, programs, right, tmp_path, monkeypatch):
    def write_wrong(module, interface, path, names):
        model = onnx.load(right[target])
        bug(model)
        onnx.save(model, path)

    monkeypatch.setattr(openvino_format, "write_onnx", write_wrong)
    real = FORMATS[".onnx"]
    wrong = Format(real.purpose, real.extra, (), write_wrong, real.open, open_pieces=real.open_pieces)
    monkeypatch.setitem(FORMATS, ".onnx", wrong)  # type: ignore[arg-type]
    with pytest.raises(fxc.VerificationError, match=r"was not written: (in the file, |output 'out)"):
        fxc.export(programs[target], tmp_path / f"m{ENGINES[target]}")
    assert list(tmp_path.iterdir()) == []


def test_integers_of_weights_that_are_off(programs, tmp_path, monkeypatch):
    spoil_weights(monkeypatch, lambda integers: integers.roll(1, 0))
    with pytest.raises(fxc.VerificationError, match="in the file, "):
        fxc.export(programs["onnxruntime"], tmp_path / "m.onnx")


def test_an_engine_that_is_off_is_told_from_a_file_that_is(programs, tmp_path, monkeypatch):
    spoil_engine(monkeypatch, ".onnx", 1.05)
    with pytest.raises(fxc.VerificationError, match=r"The file is right, but the engine's integer kernels are not"):
        fxc.export(programs["onnxruntime"], tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("numbers", "margin"), [(1, 29.1), (20, 8.8), (76, 6.0), (10**6, 6.0)])
def test_few_outputs_say_little(numbers, margin):
    assert export.margin_db(numbers) == pytest.approx(margin, abs=0.05)
