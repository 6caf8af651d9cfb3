"""insert-qdq: integers where the engine computes in them, and nowhere else."""

import pytest
import torch
from fxcompress.passes.insert_qdq import InsertQdq
from models import small_vit
from quantizing import Joined
from torch import nn

from fxcompress import InputError, PassManager, Task, load, trace
from fxcompress.artifact import save
from fxcompress.digits import ResidualBlock

TARGETS = ["openvino", "onnxruntime"]


def data(*shape, batches=4):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, generator=generator) for _ in range(batches)]


def quantized(model, *shape, calibration=None, **options):
    torch.manual_seed(0)
    before = PassManager("fold-batchnorm").run(trace(model.eval(), torch.randn(*shape))).program
    task = Task(calibration=calibration or data(*shape))
    done = PassManager([InsertQdq(**{"vnni": True} | options)]).run(before, task)
    return done.program, done.records[0]


def residual():
    torch.manual_seed(0)
    return nn.Sequential(ResidualBlock(3, 4, 1), ResidualBlock(4, 8, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(8, 5))  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
def test_a_residual_net(target, golden):
    after, record = quantized(residual(), 8, 3, 8, 8, target=target)
    assert record.result.changed
    assert record.result.refusals == ()
    assert record.comparison.sqnr_db > 25
    golden(f"insert-qdq-{target}", structure(after))


def structure(program):
    """The operators, with ``q(...)`` around what they read as integers and ``w`` for quantized weights."""
    lines = []
    for node in program.nodes:
        if node.op != "get_attr" and "quantize" not in node.name:
            lines.append(f"%{node.name} = {node.target}({', '.join(map(operand, node.all_input_nodes))})")
    return "\n".join(lines) + "\n"


def operand(node):
    if str(node.target) == "quantized_decomposed.dequantize_per_tensor.default":
        return f"q({operand(node.args[0].args[0])})"
    if str(node.target) == "quantized_decomposed.dequantize_per_channel.default":
        return f"w({node.args[0].args[0].target})"
    return str(node.target) if node.op == "get_attr" else f"%{node.name}"


def test_twice_is_once():
    after, _ = quantized(residual(), 8, 3, 8, 8)
    again = PassManager([InsertQdq()]).run(after, Task(calibration=data(8, 3, 8, 8)))
    assert not again.records[0].changed
    assert again.program.text() == after.text()


def test_a_saved_model_comes_back(tmp_path):
    after, _ = quantized(residual(), 8, 3, 8, 8)
    save(after, tmp_path / "m.pt2")
    x = data(8, 3, 8, 8)[0]
    assert torch.equal(load(tmp_path / "m.pt2")(x), after(x))


def test_weights_stay_trainable_parameters_of_their_names():
    model = residual()
    after, _ = quantized(model, 8, 3, 8, 8)
    names = set(dict(after.emit().named_parameters()))
    assert {"4.weight", "4.bias"} <= names


def test_an_unknown_target_and_observer():
    with pytest.raises(InputError, match="no quantization target 'openvno'; did you mean 'openvino'"):
        InsertQdq(target="openvno")
    with pytest.raises(InputError, match="no observer 'minmix'; did you mean 'minmax'"):
        quantized(residual(), 8, 3, 8, 8, observer="minmix")


def test_needs_calibration():
    with pytest.raises(InputError, match="ranges needs calibration batches"):
        PassManager("insert-qdq").run(trace(residual().eval(), torch.randn(2, 3, 8, 8)))


def test_a_transformer():
    _, record = quantized(small_vit(), 4, 3, 32, 32, calibration=data(8, 3, 32, 32))
    assert record.result.statistics["layers"] == 6


@pytest.mark.parametrize(("bits", "largest"), [(8, 127), (7, 63), (4, 7)])
def test_weights_of_fewer_bits(bits, largest):
    after, _ = quantized(nn.Sequential(nn.Linear(4, 3)), 8, 4, weight_bits=bits)
    (node,) = (node for node in after.nodes if "quantize_per_channel.default" in str(node.target)[:60]
               and "dequantize" not in str(node.target))  # fmt: skip
    assert node.args[4:6] == (-largest, largest)
    with pytest.raises(InputError, match="weight_bits must be from 2 to 8, not 9"):
        InsertQdq(weight_bits=9)


@pytest.mark.parametrize(("granularity", "scales"), [("channel", 3), ("tensor", 1)])
def test_granularity_of_weights(granularity, scales):
    after, record = quantized(nn.Sequential(nn.Linear(4, 3)), 8, 4, granularity=granularity)
    (found,) = (value for name, value in after.graph_module.named_buffers() if name.endswith("weight_scale"))
    assert len(found.unique()) == scales
    assert (found * 127 >= after.graph_module.get_parameter("0.weight").abs().amax(1)).all()
    assert record.comparison.sqnr_db > 25


def test_one_scale_for_one_output_channel():
    program = trace(nn.Sequential(nn.Linear(4, 1)).eval(), torch.randn(2, 4))
    manager = PassManager("insert-qdq{granularity=tensor},eliminate-dead")
    assert manager.run(program, Task(calibration=[torch.randn(8, 4)])).records[0].result.statistics["layers"] == 1


@pytest.mark.parametrize(("target", "dtype"), [("x86", torch.uint8), ("executorch", torch.int8)])
def test_integers_of_other_targets(target, dtype):
    after, record = quantized(residual(), 8, 3, 8, 8, target=target)
    assert record.comparison.sqnr_db > 25
    made = [node for node in after.nodes if node.target is torch.ops.quantized_decomposed.quantize_per_tensor.default]
    assert {node.args[-1] for node in made} == {dtype}
    assert record.result.statistics["layers"] == 7


class Tail(nn.Module):
    """What ends a residual network, or looks like it: a sum, and what reads its mean."""

    def __init__(self, end):
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 5)
        self.end = end

    def forward(self, x):
        x = self.stem(x).relu()
        return self.head(self.end((self.conv(x) + x).relu()))


def test_integers_are_carried_to_the_end_of_a_chain():
    model = Tail(lambda x: x.mean((2, 3)))
    text = structure(quantized(model, 8, 3, 8, 8, vnni=False, skip=("head",))[0])
    assert "%add = aten.add.Tensor(q(%conv), q(%relu))" in text
    assert "%mean = aten.mean.dim(q(%relu_1))" in text


def test_but_not_where_another_reader_needs_them_as_they_are():
    model = Tail(lambda x: (x - x.mean((2, 3), keepdim=True)).amax((2, 3)))
    text = structure(quantized(model, 8, 3, 8, 8, vnni=False, skip=("head",))[0])
    assert "%mean = aten.mean.dim(%relu_1)" in text


def test_nor_where_a_sum_is_not_computed_in_integers():
    model = Tail(lambda x: (x + torch.ones(4, 1, 1)).relu().mean((2, 3)))
    text = structure(quantized(model, 8, 3, 8, 8, vnni=False, skip=("head",))[0])
    assert "%mean = aten.mean.dim(%relu_2)" in text


def test_what_is_computed_of_weights_alone_stays():
    model = Tail(lambda x: (x * model.stem.bias.reshape(1, -1, 1, 1)).mean((2, 3)))
    text = structure(quantized(model, 8, 3, 8, 8, vnni=True)[0])
    assert "%mul = aten.mul.Tensor(%relu_1, %reshape)" in text


@pytest.mark.parametrize("target", TARGETS)
def test_a_sum_goes_through_an_activation(target):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Leaky(), nn.Conv2d(4, 4, 1))
    text = structure(quantized(model, 8, 3, 8, 8, target=target)[0])
    assert "%add = aten.add.Tensor(q(%_1_conv), q(%leaky_relu))" in text
    assert "%leaky_relu_1 = aten.leaky_relu.default(q(%add))" in text or target == "openvino"
    assert "%_2 = aten.conv2d.default(q(%leaky_relu_1), w(2.weight), 2.bias)" in text


@pytest.mark.parametrize("target", [*TARGETS, "executorch"])
def test_one_activation_is_computed_with_a_layer(target):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Hardtanh(-1, 9), nn.ReLU6(), nn.Conv2d(4, 4, 1))
    text = structure(quantized(model, 8, 3, 8, 8, target=target)[0])
    assert "%hardtanh = aten.hardtanh.default(%_0)" in text
    read = "%hardtanh" if target == "openvino" else "q(%hardtanh)"  # kernels that give integers do so after one
    assert f"%hardtanh_1 = aten.hardtanh.default({read})" in text


class Leaky(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        x = nn.functional.leaky_relu(x)
        return nn.functional.leaky_relu(self.conv(x) + x)


def test_a_norm_after_a_concatenation_reads_integers_in_openvino():
    text = structure(quantized(Joined(), 8, 3, 8, 8)[0])
    assert "%cat = aten.cat.default(q(%first), q(%second))" in text
    assert "%relu = aten.relu.default(%norm)" in text
    assert "%last = aten.conv2d.default(q(%relu), w(last.weight), last.bias)" in text


def test_a_norm_of_what_no_layer_in_integers_makes_reads_it_as_it_is():
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)]
    norm = nn.BatchNorm2d(3)
    nn.init.ones_(norm.bias)  # padding is not 1: the layer cannot take the norm in
    text = structure(quantized(nn.Sequential(norm, *layers), 8, 3, 8, 8)[0])
    assert "%_0 = 0(%input_1)" in text, "before it, channels may differ by orders of magnitude"
    program = trace(nn.Sequential(*layers).eval(), torch.randn(8, 3, 8, 8))
    done = PassManager([InsertQdq(vnni=True, skip=("0",))]).run(program, Task(calibration=data(8, 3, 8, 8)))
    assert "%_1 = 1(%_0)" in structure(done.program)


def test_a_norm_after_a_layer_is_computed_with_it():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
    program = trace(model.eval(), torch.randn(8, 3, 8, 8))  # as it is, with no fold-batchnorm before
    done = PassManager([InsertQdq(vnni=True)]).run(program, Task(calibration=data(8, 3, 8, 8)))
    text = structure(done.program)
    assert "%_1 = 1(%_0)" in text
    assert "%_3 = aten.conv2d.default(q(%relu)" in text
