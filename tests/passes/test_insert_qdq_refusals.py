"""What insert-qdq leaves in floating point, and says so."""

import pytest
import torch
from fxcompress.passes.insert_qdq import InsertQdq
from torch import nn

from fxcompress import InputError, PassManager, Task, trace


def data(*shape, batches=2):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, generator=generator) for _ in range(batches)]


def run(model, *shape, **options):
    torch.manual_seed(0)
    program = trace(model.eval(), torch.randn(2, *shape[1:]))
    done = PassManager([InsertQdq(vnni=True, **options)]).run(program, Task(calibration=data(*shape)))
    return done.program, done.records[0].result


def refused(result):
    return [(refusal.code, refusal.node) for refusal in result.refusals]


class Between(nn.Module):
    """Two linear layers and what is between them."""

    def __init__(self, middle, width=4):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 4), middle, nn.Linear(width, 3)

    def forward(self, x):
        return self.last(self.middle(self.first(x)))


class Times(nn.Module):
    def __init__(self):
        super().__init__()
        self.held = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return torch.matmul(x, self.held)


class ComputedWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.held = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return nn.functional.linear(x, self.held.tanh())


class Masked(nn.Module):
    def forward(self, x):
        return x.masked_fill(x > 0, -1e35)


class Adding(Times):
    def forward(self, x):
        return torch.addmm(self.held[0], x, self.held)


@pytest.mark.parametrize(("model", "node"), [(Times, "matmul"), (Adding, "addmm")])
def test_a_product_with_state(model, node):
    _, result = run(Between(model()), 8, 4)
    assert refused(result) == [("constant-operand", node)]
    assert "canonicalize-linear" in result.refusals[0].reason
    assert result.statistics["layers"] == 2


class Stacked(nn.Module):
    """Matrices for groups of rows, which no linear layer has."""

    def __init__(self):
        super().__init__()
        self.held = nn.Parameter(torch.randn(1, 4, 4))

    def forward(self, x):
        return torch.matmul(x.unsqueeze(1), self.held).squeeze(1)


def test_a_product_with_stored_matrices():
    _, result = run(Between(Stacked()), 8, 4)
    assert refused(result) == [("constant-operand", "matmul")]
    assert "canonicalize-linear" not in result.refusals[0].reason


def test_a_weight_that_is_computed():
    _, result = run(Between(ComputedWeight()), 8, 4)
    assert refused(result) == [("computed-weight", "linear")]


def test_no_kernel_for_a_transposed_convolution_in_onnxruntime():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 3, 2))
    _, result = run(model, 8, 3, 6, 6, target="onnxruntime")
    assert [refusal.code for refusal in result.refusals] == ["no-integer-kernel"]
    assert "aten.conv_transpose2d.input" in result.refusals[0].reason
    assert result.statistics["layers"] == 1
    _, result = run(model, 8, 3, 6, 6, target="openvino")
    assert result.refusals == ()


def with_value(name, value):
    program = trace(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).eval(), torch.randn(2, 4)).copy()
    with torch.no_grad():
        program.graph_module.get_parameter(name)[0] = value
    return program


def test_a_bias_that_is_infinite():
    result = InsertQdq(vnni=True).run(with_value("2.bias", torch.inf), Task(calibration=data(8, 4)))
    assert refused(result) == [("not-finite", "_2")]
    assert "its bias holds NaN or Inf" in result.refusals[0].reason


def test_a_weight_that_makes_nan_is_named():
    with pytest.raises(InputError, match="_2 computes NaN on calibration batch 0; check that batch, or the weights"):
        InsertQdq(vnni=True).run(with_value("2.weight", torch.nan), Task(calibration=data(8, 4)))


def test_a_range_that_is_infinite():
    _, result = run(Between(Masked()), 8, 4)
    assert refused(result) == [("unbounded-range", "last")]
    assert "which is infinite or NaN on calibration batches" in result.refusals[0].reason


@pytest.mark.parametrize("factor", [0.0, 1e-42])
def test_activations_that_are_constant_or_underflow(factor):
    class Scaled(nn.Module):
        def forward(self, x):
            return x * factor

    program, result = run(Between(Scaled()), 8, 4)
    assert result.refusals == ()
    assert torch.isfinite(program(torch.randn(2, 4))).all()


class Repaired(nn.Module):
    """Rows that are masked as a whole, which attention makes NaN of, and 0 of that."""

    def forward(self, x):
        return x.masked_fill(x[:, :1] > 0, -torch.inf).softmax(-1).nan_to_num()


def test_nan_that_the_model_repairs_itself():
    program, result = run(Between(Repaired()), 8, 4)
    assert result.refusals == ()
    assert result.statistics["layers"] == 2
    assert torch.isfinite(program(torch.randn(2, 4))).all()


class Attends(nn.Module):
    def forward(self, x):
        x = x.unsqueeze(1)
        return nn.functional.scaled_dot_product_attention(x, x, x).squeeze(1)


class Squares(nn.Module):
    def forward(self, x):
        return torch.matmul(x.unsqueeze(2), x.unsqueeze(1)).flatten(1)


@pytest.mark.parametrize("target", ["openvino", "onnxruntime", "x86", "executorch"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("model", [Attends, Squares])
def test_products_of_another_dtype(model, dtype, target):
    task = Task(calibration=[batch.to(dtype) for batch in data(8, 4)])
    before = trace(model(), torch.randn(2, 4, dtype=dtype))
    record = PassManager([InsertQdq(target=target, vnni=True)]).run(before, task).records[0]
    (refusal,) = record.result.refusals
    no_kernel = target in ("executorch", "x86")
    assert refusal.code == ("no-integer-kernel" if no_kernel else "not-float32")
    assert no_kernel or str(dtype) in refusal.reason
    assert record.result.statistics == {"layers": 0, "activations": 0}


@pytest.mark.parametrize("first", ["quantize-weights", "quantize-dynamic", "insert-qdq{vnni=true}"])
def test_a_model_that_is_quantized_already(first):
    task = Task(calibration=data(8, 4))
    program = PassManager(first).run(trace(Between(nn.ReLU()).eval(), torch.randn(2, 4)), task).program
    record = PassManager([InsertQdq(vnni=True)]).run(program, task).records[0]
    assert [refusal.code for refusal in record.result.refusals] == ["already-quantized"]
    assert not record.changed


def test_a_layer_without_weights():
    _, result = run(Between(nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 4))), 8, 4)
    assert refused(result) == [("empty-weight", "middle_0"), ("empty-weight", "middle_1")]
    assert result.statistics["layers"] == 2


def test_a_concatenation_of_nothing():
    class Nothing(nn.Module):
        def forward(self, x):
            return torch.cat([x[:, :0], x], 1)

    _, result = run(Between(Nothing()), 8, 4)
    assert result.statistics["layers"] == 2


@pytest.mark.parametrize("passes", ["insert-qdq", "quantize-weights", "quantize-dynamic", "cast"])
def test_a_pattern_that_names_nothing(passes):
    program = trace(Between(nn.ReLU()).eval(), torch.randn(2, 4))
    with pytest.raises(InputError, match=r"the pattern 'lost' in skip matches no layer; did you mean.* 'last'"):
        PassManager(f"{passes}{{skip=[lost]}}").run(program, Task(calibration=data(8, 4)))


def test_a_pattern_that_names_a_module_around_layers():
    _, result = run(Between(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))), 8, 4, skip=("middle",))
    assert result.statistics["layers"] == 2
