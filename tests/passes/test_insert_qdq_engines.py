"""The engines' own executed graphs: every layer that was quantized is computed in integers."""

from collections import Counter, defaultdict

import pytest
import torch
from fxcompress.passes.insert_qdq import InsertQdq
from models import BERT_INPUTS, residual_net, small_bert, small_vit
from quantizing import Joined
from torch import nn
from torch.nn import functional

from fxcompress import InputError, PassManager, Task, export, trace
from fxcompress.engines.executed import executed_layers, integer_share
from fxcompress.engines.export import tensor_names
from fxcompress.engines.formats import format_of
from fxcompress.engines.integers import with_integer_weights
from fxcompress.verification.numerics import compare_outputs

ENGINES = {"openvino": "xml", "onnxruntime": "onnx"}


def images(rows, side):
    return torch.randn(rows, 3, side, side, generator=torch.Generator().manual_seed(1))


def with_biases(model):
    """Engines fold what is zero: biases are not, as in a trained model."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def convolutions():
    return with_biases(residual_net()), images(2, 8), None, [images(8, 8)]


def vit():
    return with_biases(small_vit()), images(2, 32), None, [images(8, 32)]


def bert():
    inputs, dynamic = BERT_INPUTS
    return with_biases(small_bert()), ((), inputs), dynamic, [((), inputs)] * 4


def quantized(subject, target, **options):
    pytest.importorskip(target)
    model, example, dynamic, batches = subject()
    before = PassManager("fold-batchnorm").run(trace(model, example, dynamic=dynamic)).program
    task = Task(calibration=batches, inputs=lambda batch: batch)
    return PassManager([InsertQdq(target=target, vnni=True, **options)]).run(before, task)


def written(program, file):
    """The file that ``export`` writes first, whatever the engine's kernels lose on this machine."""
    module = with_integer_weights(program.emit())
    args, kwargs = program.interface.args, program.interface.kwargs
    format_of(file).write(module, program.interface, file, tensor_names(program.interface, module(*args, **kwargs)))
    return file


def finished(program, file):
    """The file that ``export`` keeps."""
    written(program, file)
    if format_of(file).finish is not None:
        format_of(file).finish(file)
    return file


@pytest.mark.parametrize(("subject", "count"), [(convolutions, 7), (vit, 8), (bert, 9)])
@pytest.mark.parametrize("target", ENGINES)
def test_every_layer_is_computed_in_integers(subject, count, target, tmp_path):
    done = quantized(subject, target)
    file = finished(done.program, tmp_path / f"m.{ENGINES[target]}")
    layers = executed_layers(file)
    attention = sum(layer.operator == "MHA" for layer in layers)  # two products in one where there is AVX-512
    assert len(layers) + attention == count
    assert [layer for layer in layers if not layer.integer] == []
    assert integer_share(layers) == 1


class Dead(nn.Module):
    """A channel that is always 0, of which a layer takes 5000 times as much as of others."""

    def __init__(self):
        super().__init__()
        self.first, self.deep, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 1)
        with torch.no_grad():
            self.first.bias.copy_(torch.tensor([-99.0, 0.1, 0.2, 0.3]))
            self.deep.weight[0] = 5000.0
            self.deep.bias.fill_(0.3)

    def forward(self, x):
        return self.last(self.deep(self.first(x).relu()).relu())


@pytest.mark.parametrize("target", ENGINES)
def test_a_dead_channel_keeps_its_bias(target, tmp_path):
    done = quantized(lambda: (Dead().eval(), images(2, 8), None, [images(8, 8)]), target)
    assert done.records[0].comparison.sqnr_db > 30
    file = export(done.program, tmp_path / f"m.{ENGINES[target]}").path
    x = images(8, 8)
    (found,) = format_of(file).open(file, tensor_names(done.program.interface, done.program(x)))([x])
    assert compare_outputs([done.program(x)], [found]).sqnr_db > 30


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(64, 64) for _ in range(4))

    def forward(self, x):
        query, key, value = (
            layer(x).unflatten(-1, (4, 16)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        weights = (query @ key.transpose(-1, -2) * 0.25).softmax(-1)
        return self.out((weights @ value).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("skip", "all_integer"), [((), True), (("matmul",), False), (("matmul_1",), False)])
@pytest.mark.parametrize("target", ENGINES)
def test_attention_of_which_one_product_is_not(target, skip, all_integer, tmp_path):
    x = torch.randn(8, 12, 64, generator=torch.Generator().manual_seed(0))
    done = quantized(lambda: (with_biases(Attention()), x, None, [x]), target, skip=skip)
    layers = executed_layers(finished(done.program, tmp_path / f"m.{ENGINES[target]}"))
    assert (integer_share(layers) == 1) == all_integer


@pytest.mark.parametrize("target", ENGINES)
def test_what_is_skipped_is_not(target, tmp_path):
    done = quantized(convolutions, target, skip=("4",))
    file = finished(done.program, tmp_path / f"m.{ENGINES[target]}")
    assert [layer.integer for layer in executed_layers(file)] == [True] * 6 + [False]


class Gated(nn.Module):
    """SiLU and a gate of the means of an image, and what is read in floating point too."""

    def __init__(self, activation):
        super().__init__()
        self.first, self.activation = nn.Conv2d(3, 8, 3), activation
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.second, self.last = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = self.activation(self.first(x))
        gate = self.excite(self.activation(self.squeeze(x.mean((2, 3), keepdim=True)))).sigmoid()
        x = self.activation(self.second(x * gate))
        return self.last(x), x.cos()


class Shuffled(nn.Module):
    """Half of the channels goes through a layer, and the halves are mixed."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        kept, read = self.first(x).relu().chunk(2, 1)
        return self.last(torch.channel_shuffle(torch.cat([kept, self.second(read).relu()], 1), 2))


def computed(file, tmp_path):
    """How often onnxruntime computes each operator between layers."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)


@pytest.mark.parametrize(("activation", "gates"), [(nn.SiLU(), 4), (nn.Hardswish(), 1)])
def test_gates_and_means_are_computed_in_integers(activation, gates, tmp_path):
    done = quantized(lambda: (with_biases(Gated(activation)), images(2, 8), None, [images(8, 8)]), "onnxruntime")
    found = computed(written(done.program, tmp_path / "m.onnx"), tmp_path)
    assert found["QLinearMul"] == 4
    assert found["QLinearSigmoid"] == gates
    assert found["QLinearAveragePool"] == 1
    assert not found.keys() & {"Sigmoid", "Mul", "ReduceMean"}


def unread(file):
    """What the operations of a file give, and what of that is read."""
    import onnx

    graph = onnx.load(file).graph
    made = {name for node in graph.node for name in node.output}
    return made, made & ({name for node in graph.node for name in node.input} | {value.name for value in graph.output})


def values(file, x):
    """What a file gives, computed as it is written."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(value) for value in session.run(None, {session.get_inputs()[0].name: x.numpy()})]


def test_hard_sigmoids_between_integers_are_sums_of_integers(tmp_path):
    done = quantized(lambda: (with_biases(Gated(nn.Hardswish())), images(2, 8), None, [images(8, 8)]), "onnxruntime")
    before, after = written(done.program, tmp_path / "a.onnx"), finished(done.program, tmp_path / "b.onnx")
    hard = [computed(file, tmp_path)["HardSigmoid"] for file in (before, after)]
    assert hard == [3, 0]
    assert computed(after, tmp_path)["QLinearAdd"] == 3
    x = 4 * images(16, 8)  # beyond the calibrated ranges too
    torch.testing.assert_close(values(before, x), values(after, x), rtol=0, atol=1e-6)
    made, read = unread(after)
    assert made == read, "nothing is left that nobody reads"


class Read(nn.Module):
    """A hard sigmoid that is also read as it is."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        gate = functional.hardsigmoid(self.first(x))
        return self.second(gate), gate.cos()


def test_a_hard_sigmoid_that_is_read_in_floating_point_stays(tmp_path):
    done = quantized(lambda: (with_biases(Read()), images(2, 8), None, [images(8, 8)]), "onnxruntime")
    assert computed(finished(done.program, tmp_path / "m.onnx"), tmp_path)["HardSigmoid"] == 1


def test_integers_go_through_pieces_of_channels(tmp_path):
    done = quantized(lambda: (with_biases(Shuffled()), images(2, 8), None, [images(8, 8)]), "onnxruntime")
    found = computed(written(done.program, tmp_path / "m.onnx"), tmp_path)
    assert found["QLinearConcat"] == 1
    assert (found["QuantizeLinear"], found["DequantizeLinear"]) == (1, 1)


def test_pieces_of_channels_are_not_rounded_again_for_openvino():
    done = quantized(lambda: (with_biases(Shuffled()), images(2, 8), None, [images(8, 8)]), "openvino")
    rounded = [n for n in done.program.nodes if n.target is torch.ops.quantized_decomposed.quantize_per_tensor.default]
    assert len(rounded) == 3, "the input, and what the first two layers give"


def test_concatenations_before_norms_are_of_integers_in_openvino(tmp_path):
    done = quantized(lambda: (with_biases(Joined()), images(2, 8), None, [images(8, 8)]), "openvino")
    executed = precisions(written(done.program, tmp_path / "m.xml"))
    assert executed["Concatenation"] in ({"i8"}, {"u8"})


def precisions(file):
    """What OpenVINO computes each operator in."""
    import openvino

    core = openvino.Core()
    compiled = core.compile_model(core.read_model(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = defaultdict(set)
    for operation in compiled.get_runtime_model().get_ordered_ops():
        said = operation.get_rt_info()
        found[said["layerType"].value].add(said["runtimePrecision"].value)
    return found


def test_other_files_have_no_executed_graph(tmp_path):
    with pytest.raises(
        InputError, match=r"m.pt2 has no executed graph to read; give a file that ends in .onnx or .xml or .pte"
    ):
        executed_layers(tmp_path / "m.pt2")


def test_no_layer_is_all_of_none():
    assert integer_share(()) == 1


class ClassToken(nn.Module):
    """A stored token on either side of the others."""

    def __init__(self):
        super().__init__()
        self.token, self.head = nn.Parameter(torch.randn(1, 1, 8)), nn.Linear(8, 8)

    def forward(self, x):
        token = self.token.expand(x.shape[0], -1, -1)
        return self.head(torch.cat([token, x, token], 1))


def class_token():
    x = torch.randn(8, 6, 8, generator=torch.Generator().manual_seed(1))
    return with_biases(ClassToken()), x, None, [x]


@pytest.mark.parametrize("target", ENGINES)
def test_what_is_joined_with_state_is_integers_as_a_whole(target, tmp_path):
    done = quantized(class_token, target)
    assert done.records[0].result.statistics["layers"] == 1
    file = finished(done.program, tmp_path / f"m.{ENGINES[target]}")
    assert [layer.integer for layer in executed_layers(file)] == [True]


def zero_heads():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(144, 3))
    for layer in (model[2], model[4]):
        nn.init.zeros_(layer.weight)
    return with_biases(model), images(8, 8), None, [images(8, 8)]


@pytest.mark.parametrize("target", ENGINES)
def test_layers_that_are_zero_keep_their_biases(target, tmp_path):
    done = quantized(zero_heads, target, weight_bits=7)
    assert done.records[0].comparison.sqnr_db > 80
    export(done.program, tmp_path / f"m.{ENGINES[target]}")
