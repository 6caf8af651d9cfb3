"""Export: each file is run and compared before it takes its place; what cannot be exported gives one clear error."""

import copy
import functools
import pickle

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from installed import SUFFIXES
from models import BERT_INPUTS, residual_net, small_bert, small_vit
from torch import nn
from torch.nn import functional

import fxcompress as fxc
from fxcompress.engines import formats
from fxcompress.engines.export import tensor_names
from fxcompress.engines.formats import FORMATS


class Tied(nn.Module):
    """Tied weights, a dict in, a dict with a nested list, an integer and ``None`` out."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, batch, scale=2):
        x = self.embed(batch["tokens"]) * scale + batch["offset"]
        logits = self.head(torch.tanh(x))
        return {"logits": logits, "best": [logits.argmax(-1), x.mean((1, 2))], "count": 3, "none": None}


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return torch.relu(self.layer(x)), x.sum(1)


def small_t5():
    """Its attention has a bias, whose kernels lay out their results in two ways."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=11, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).eval()


class WindowAttention(nn.Module):
    """Attention of five dims."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        heads = self.inner(x).unflatten(1, (2, -1)).unflatten(-1, (2, -1)).transpose(2, 3)
        return nn.functional.scaled_dot_product_attention(heads, heads, heads).transpose(2, 3).reshape(x.shape)


class Pieces(nn.Module):
    """A sequence whose length nobody knows in three pieces, the last of which may be shorter."""

    def forward(self, x):
        first, second, third = x.chunk(3, -2)
        return first * 2, second.sum(1), third


class BothAtOnce(nn.Module):
    """Two inputs go through a layer as one batch, which is cut again where nobody knows how long it is."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, first, second):
        one, other = self.inner(torch.cat([first, second])).chunk(2, 0)
        left, right = torch.cat([one, other]).split(one.shape[0], dim=-2)
        return one - other, left * right


class Around(nn.Module):
    """Both ends of an image meet; one dim is padded at one end only, or cut."""

    def forward(self, x):
        padded, cut = (nn.functional.pad(x, pad, mode="circular") for pad in ((1, 2, 3, 0), (-1, 2, 1, -2)))
        return padded, cut


MODELS = {
    "around": (Around, torch.randn(2, 3, 6, 6), None),
    "both at once": (BothAtOnce, (torch.randn(2, 4), torch.randn(2, 4)), None),
    "windows": (WindowAttention, torch.randn(2, 8, 8), None),
    "t5": (small_t5, ((), {"input_ids": torch.randint(0, 11, (2, 5)), "attention_mask": torch.ones(2, 5)}), None),
    "residual": (residual_net, torch.randn(2, 3, 8, 8), None),
    "vit": (small_vit, torch.randn(2, 3, 32, 32), None),
    "bert": (small_bert, *BERT_INPUTS),
    "tied, dicts": (
        Tied,
        (({"tokens": torch.randint(0, 11, (2, 5)), "offset": torch.randn(2, 1, 1)},), {"scale": 3}),
        None,
    ),
}


@functools.cache
def traced(name):
    torch.manual_seed(0)
    make, inputs, dynamic = MODELS[name]
    return fxc.trace(make(), inputs, dynamic=dynamic)


@pytest.fixture(scope="module")
def plain():
    torch.manual_seed(0)
    return fxc.trace(Plain(), torch.randn(2, 4))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", MODELS)
def test_every_format_computes_what_the_model_computes(name, suffix, tmp_path):
    path = tmp_path / f"m{suffix}"
    exported = fxc.export(traced(name).emit(), path)
    made = ["m.bin", "m.xml"] if suffix == ".xml" else [f"m{suffix}"]
    assert sorted(file.name for file in tmp_path.iterdir()) == made
    assert exported.path == path
    assert exported.size == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert exported.max_relative_error <= 1e-5
    assert str(exported).startswith(f"{path} (")


@pytest.mark.parametrize("suffix", [".onnx", ".xml", ".pt2"])
def test_pieces_of_a_length_that_is_dynamic(suffix, tmp_path):
    program = fxc.trace(Pieces(), {"x": torch.randn(2, 8, 4)}, dynamic={"x": (1,)})
    path = fxc.export(program, tmp_path / f"m{suffix}").path
    for length in (8, 9, 11):
        x = torch.randn(3, length, 4)
        names = tensor_names(program.interface, program(x))
        torch.testing.assert_close(FORMATS[suffix].open(path, names)([x]), [*program(x)])


def test_onnx_keeps_names_and_dynamic_dims(plain, tmp_path):
    fxc.export(traced("bert"), tmp_path / "bert.onnx")
    graph = onnx.load(tmp_path / "bert.onnx").graph
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert shapes == {
        "input_ids": ["batch", "input_ids_dim1"],
        "attention_mask": ["batch", "input_ids_dim1"],
        "last_hidden_state": ["batch", "input_ids_dim1", 16],
        "pooler_output": ["batch", 16],
    }
    session = onnxruntime.InferenceSession(tmp_path / "bert.onnx", providers=["CPUExecutionProvider"])
    feed = {name: np.ones((5, 9), dtype=np.int64) for name in ("input_ids", "attention_mask")}
    assert session.run(None, feed)[0].shape == (5, 9, 16)


def test_structured_inputs_and_outputs_get_readable_names(tmp_path):
    fxc.export(traced("tied, dicts"), tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert [value.name for value in graph.input] == ["batch_tokens", "batch_offset"]
    assert [value.name for value in graph.output] == ["logits", "best_0", "best_1"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_output_that_is_an_input(suffix, tmp_path):
    class Passes(nn.Module):
        def forward(self, x, mask):
            return x * mask, mask, x

    x, mask = torch.randn(2, 4), torch.rand(2, 4)
    program = fxc.trace(Passes(), (x, mask))
    path = fxc.export(program, tmp_path / f"m{suffix}").path
    run = FORMATS[suffix].open(path, tensor_names(program.interface, program(x, mask)))
    torch.testing.assert_close(run([x, mask]), [x * mask, mask, x])


def test_openvino_weights_stay_in_full_precision(plain, tmp_path):
    fxc.export(plain, tmp_path / "m.xml")
    model = openvino.Core().read_model(tmp_path / "m.xml")
    types = {op.get_element_type() for op in model.get_ops() if op.get_type_name() == "Constant" and len(op.shape) == 2}
    assert types == {openvino.Type.f32}
    assert [port.get_any_name() for port in model.outputs] == ["output_0", "output_1"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_float16(suffix, tmp_path):
    program = fxc.trace(nn.Sequential(nn.Linear(4, 3), nn.ReLU()).half(), torch.randn(2, 4).half())
    assert fxc.export(program, tmp_path / f"m{suffix}").max_relative_error <= 2e-2
    if suffix == ".onnx":
        assert onnx.load(tmp_path / "m.onnx").graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16


def test_bfloat16_fits_pt2_only(tmp_path):
    program = fxc.trace(Plain().bfloat16(), torch.randn(2, 4).bfloat16())
    assert fxc.export(program, tmp_path / "m.pt2").max_relative_error == 0
    for suffix in (".onnx", ".xml"):
        with pytest.raises(fxc.InputError, match=r"bfloat16 inputs or outputs; convert the model"):
            fxc.export(program, tmp_path / f"m{suffix}")


def test_example_inputs_come_along_through_deepcopy_but_not_through_pickle(plain, tmp_path):
    module = plain.emit()
    assert fxc.export(copy.deepcopy(module), tmp_path / "copied.pt2").max_relative_error == 0
    unpickled = pickle.loads(pickle.dumps(module))
    with pytest.raises(fxc.InputError, match=r"carries no example inputs .*; pass example_inputs"):
        fxc.export(unpickled, tmp_path / "m.pt2")
    assert fxc.export(unpickled, tmp_path / "m.onnx", torch.randn(3, 4)).max_relative_error <= 1e-5


def test_a_module_in_training_mode_is_exported_as_it_infers_and_not_changed(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    module = fxc.trace(model, torch.randn(3, 4)).emit().train()
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert fxc.export(module, tmp_path / "m.onnx").max_relative_error <= 1e-5
    assert all(part.training for part in module.modules())
    assert all(torch.equal(state[name], tensor) for name, tensor in module.state_dict().items())


def test_export_says_nothing(plain, tmp_path, capfd, recwarn):
    fxc.export(plain, tmp_path / "m.onnx")
    assert capfd.readouterr() == ("", "")
    assert [str(warning.message) for warning in recwarn if "onnx" in str(warning.filename)] == []


# --- what is off is not written --------------------------------------------------------------------------------------


def broken(suffix, break_result):
    """A format whose file is right but whose runs give something else."""
    real = FORMATS[suffix]

    def open_broken(path, names):
        run = real.open(path, names)
        return lambda tensors: break_result(run(tensors))

    return formats.Format(real.purpose, real.extra, (), real.write, open_broken)


def test_an_engine_s_own_error_names_the_file(plain, tmp_path, monkeypatch):
    def fail(results):
        raise RuntimeError("Exception from somewhere\n  shapes do not fit")

    monkeypatch.setitem(FORMATS, ".pt2", broken(".pt2", fail))
    with pytest.raises(
        fxc.ArtifactError, match=r"m.pt2 was not written: the engine cannot run it \(shapes do not fit\)"
    ):
        fxc.export(plain, tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())


class Experts(nn.Module):
    """Rows in groups, one of them empty, each with a matrix of its own; the last row is in none."""

    def __init__(self):
        super().__init__()
        self.matrices = nn.Parameter(torch.randn(3, 16, 8))
        self.register_buffer("ends", torch.tensor([2, 2, 5], dtype=torch.int32))

    def forward(self, x):
        return functional.grouped_mm(x, self.matrices, offs=self.ends)[:5]


@pytest.mark.skipif(torch.__version__ < (2, 15), reason="before, PyTorch exports grouped products in bfloat16 only")
@pytest.mark.parametrize("suffix", [".onnx", ".xml", ".pt2"])
def test_grouped_products_of_experts(suffix, tmp_path):
    torch.manual_seed(0)
    fxc.export(fxc.trace(Experts(), torch.randn(6, 16), batch_dim=None), tmp_path / f"m{suffix}")


def shifted(results):
    return [results[0], results[1] * 1.001]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_is_off_names_the_output_and_is_not_written(suffix, plain, tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS, suffix, broken(suffix, shifted))  # type: ignore[arg-type]
    (tmp_path / f"m{suffix}").write_bytes(b"old")
    with pytest.raises(
        fxc.VerificationError, match=r"'output_1' differs from the model by 1\.\d+e-03 .*allowed: 1e-04"
    ):
        fxc.export(plain, tmp_path / f"m{suffix}")
    assert [file.name for file in tmp_path.iterdir()] == [f"m{suffix}"]
    assert (tmp_path / f"m{suffix}").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("break_result", "says"),
    [
        (lambda r: [r[0] * float("nan"), r[1]], "'output_0' holds NaN"),
        (lambda r: [r[0], r[1][:2]], r"'output_1' is torch.float32 \(2,\) where torch.float32 \(3,\) is expected"),
        (lambda r: [r[0].double(), r[1]], "'output_0' is torch.float64"),
    ],
)
def test_nan_and_other_shapes_and_dtypes_are_caught(break_result, says, plain, tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS, ".pt2", broken(".pt2", break_result))  # type: ignore[arg-type]
    with pytest.raises(fxc.VerificationError, match=says):
        fxc.export(plain, tmp_path / "m.pt2")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_nothing_behind(plain, tmp_path, monkeypatch):
    def interrupted(results):
        raise KeyboardInterrupt

    monkeypatch.setitem(FORMATS, ".pt2", broken(".pt2", interrupted))  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        fxc.export(plain, tmp_path / "m.pt2")
    assert list(tmp_path.iterdir()) == []


# --- bad input -------------------------------------------------------------------------------------------------------


class Bessel(nn.Module):
    def forward(self, x):
        return torch.special.i1e(x)


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_an_operator_that_onnx_lacks_is_named(suffix, tmp_path):
    program = fxc.trace(Bessel(), torch.randn(2, 3))
    with pytest.raises(fxc.ArtifactError, match=rf"m\{suffix} cannot be written: .*bessel_i1e\.default; write it with"):
        fxc.export(program, tmp_path / f"m{suffix}")
    assert list(tmp_path.iterdir()) == []


class Volume(nn.Module):
    def forward(self, x):
        return torch.linalg.det(x)


def test_an_operator_that_openvino_lacks_is_named(tmp_path):
    program = fxc.trace(Volume(), torch.randn(2, 3, 3))
    with pytest.raises(fxc.ArtifactError, match=r"m\.xml cannot be written: OpenVINO cannot read it \(No .* Det-\d+\)"):
        fxc.export(program, tmp_path / "m.xml")
    assert list(tmp_path.iterdir()) == []


class Spectrum(nn.Module):
    def forward(self, x):
        return torch.einsum("nf,fg->ng", torch.fft.fft(x), torch.ones(3, 3, dtype=torch.complex64)).abs()


def test_complex_numbers_are_named_where_they_are_the_reason(tmp_path):
    program = fxc.trace(Spectrum(), torch.randn(2, 3))
    with pytest.raises(fxc.ArtifactError, match=r"einsum\.default on complex numbers; write it with"):
        fxc.export(program, tmp_path / "m.onnx")


def test_unknown_suffix_lists_the_known_ones(plain, tmp_path):
    with pytest.raises(
        fxc.InputError, match=r"'\.tflite'.*\.onnx \(ONNX\), \.xml \(OpenVINO IR\), \.pte \(ExecuTorch\), \.pt2"
    ):
        fxc.export(plain, tmp_path / "m.tflite")
    with pytest.raises(fxc.InputError, match="no suffix"):
        fxc.export(plain, tmp_path / "m")


def test_a_model_that_was_not_traced(tmp_path):
    with pytest.raises(fxc.InputError, match="not Plain; trace it first"):
        fxc.export(Plain(), tmp_path / "m.onnx")


def test_meta_weights(tmp_path):
    with torch.device("meta"):
        program = fxc.trace(Plain(), torch.empty(2, 4))
    with pytest.raises(fxc.InputError, match="meta device and has no weights"):
        fxc.export(program, tmp_path / "m.onnx")


def test_missing_directory(plain, tmp_path):
    with pytest.raises(fxc.ArtifactError, match=r"the directory .*nowhere does not exist"):
        fxc.export(plain, tmp_path / "nowhere" / "m.onnx")


def test_example_inputs_that_do_not_fit(plain, tmp_path):
    with pytest.raises(fxc.InputError, match=r"do not fit|fails on the example inputs"):
        fxc.export(plain.emit(), tmp_path / "m.pt2", (torch.randn(2, 4), torch.randn(2, 4)))
