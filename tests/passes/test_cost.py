"""cost: parameters, MACs and bytes of each layer, agreeing with torch's own counter and with the literature."""

import copy
import dataclasses

import pytest
import torch
from fxcompress.passes.cost import Cost
from models import inputs
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fxcompress import trace
from fxcompress.ir.macs import RULES, counts

aten = torch.ops.aten


def cost_of(model, x, **options):
    return trace(model.eval(), x, **options).analyze(Cost())


def counted_by_torch(model, *xs):
    """MACs that torch's counter sees in a real run; meta tensors keep fused CPU kernels, which it misses, out of it."""
    model = copy.deepcopy(model).eval().to("meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*(x.to("meta") for x in xs))
    return counter.get_total_flops() // 2


class Call(nn.Module):
    """A function of its inputs."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *xs):
        return self.function(*xs)


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.rnn = kind(4, 6, 2, batch_first=True, bidirectional=True, **options)

    def forward(self, x):
        return self.rnn(x)[0]


def attention(query, key, value):
    return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)


CASES = {
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, groups=2), [(1, 4, 9)]),
    "conv2d": (nn.Conv2d(4, 6, (3, 1), padding=1, dilation=2), [(1, 4, 9, 7)]),
    "conv2d same": (nn.Conv2d(4, 4, 3, padding="same", groups=4), [(1, 4, 9, 7)]),
    "conv3d": (nn.Conv3d(2, 3, 2), [(1, 2, 4, 5, 6)]),
    "conv_transpose1d": (nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2), [(1, 4, 9)]),
    "conv_transpose2d": (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), [(1, 4, 5, 6)]),
    "conv_transpose3d": (nn.ConvTranspose3d(2, 3, 2), [(1, 2, 4, 5, 6)]),
    "linear": (nn.Linear(4, 6), [(1, 3, 4)]),
    "matmul": (Call(torch.matmul), [(1, 3, 4), (1, 4, 5)]),
    "matmul broadcast": (Call(torch.matmul), [(1, 2, 3, 4), (1, 1, 4, 5)]),
    "baddbmm": (Call(torch.baddbmm), [(1, 3, 5), (1, 3, 4), (1, 4, 5)]),
    "einsum": (Call(lambda a, b: torch.einsum("bqhd,bkhd->bhqk", a, b)), [(1, 3, 2, 4), (1, 5, 2, 4)]),
    "einsum of three": (
        Call(lambda a, b, c: torch.einsum("bij,bjk,bkl->bil", a, b, c)),
        [(1, 3, 4), (1, 4, 5), (1, 5, 6)],
    ),
    "attention": (Call(attention), [(1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4)]),
    "lstm": (Recurrent(nn.LSTM), [(1, 5, 4)]),
    "lstm projected": (Recurrent(nn.LSTM, proj_size=3), [(1, 5, 4)]),
    "gru": (Recurrent(nn.GRU), [(1, 5, 4)]),
}


@pytest.mark.parametrize("case", CASES)
def test_macs_are_those_of_torchs_counter(case):
    model, shapes = CASES[case]
    xs = tuple(torch.randn(shape) for shape in shapes)
    rows = tuple(torch.cat([x, x]) for x in xs)

    report = cost_of(model, rows)

    assert report.macs == counted_by_torch(model, *xs)
    assert report.macs > 0


def test_attention_with_grouped_queries_counts_every_query_head():
    def grouped(query, key, value):
        return nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)

    report = cost_of(Call(grouped), (torch.randn(2, 8, 3, 4), torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5, 4)))

    assert report.macs == 8 * 3 * 5 * (4 + 4)


def test_addmm_counts_its_product_alone():
    report = cost_of(Call(torch.addmm), (torch.randn(3, 5), torch.randn(3, 4), torch.randn(4, 5)), batch_dim=None)

    assert report.macs == 3 * 4 * 5


@pytest.mark.parametrize(
    ("contract", "shapes", "macs"),
    [
        (torch.inner, [(2, 3, 4), (5, 4)], 2 * 3 * 5 * 4),
        (lambda x, y: torch.inner(x, y[0, 0]), [(2, 3), (1, 1)], 0),
        (lambda x, y: torch.tensordot(x, y, dims=([2, 1], [0, 2])), [(2, 3, 4), (4, 6, 3)], 2 * 6 * 4 * 3),
    ],
)
def test_contractions_of_any_dims(contract, shapes, macs):
    xs = tuple(torch.randn(shape) for shape in shapes)

    report = cost_of(Call(contract), xs, batch_dim=None)

    assert report.macs == macs == counted_by_torch(Call(contract), *xs)


@pytest.mark.parametrize(("cell", "gates"), [(nn.LSTMCell, 4), (nn.GRUCell, 3), (nn.RNNCell, 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_recurrent_cell_applies_both_matrices_at_each_step(cell, gates, bias):
    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = cell(4, 6, bias=bias)

        def forward(self, x):
            state = self.cell(x[:, 0])
            return self.cell(x[:, 1], state)

    report = cost_of(Steps(), torch.randn(2, 2, 4))

    assert report.macs == 2 * gates * (6 * 4 + 6 * 6)


def test_a_recurrent_cell_counts_every_row():
    report = cost_of(nn.RNNCell(4, 6, nonlinearity="relu"), torch.randn(3, 4), batch_dim=None)

    assert report.macs == 3 * (6 * 4 + 6 * 6)


def test_resnet50_has_the_published_cost():
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        model = torchvision.models.resnet50()

    report = cost_of(model, torch.empty(2, 3, 224, 224, device="meta"))

    assert report.params == 25_557_032
    assert report.macs == pytest.approx(4.09e9, rel=1e-3)
    assert report.macs == counted_by_torch(model, torch.empty(1, 3, 224, 224))
    assert len(report.layers) == 53 + 53 + 1


def small():
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2))


def test_rows_are_the_layers_in_order():
    conv, norm, linear = cost_of(small(), torch.randn(2, 3, 5, 5)).layers

    assert (conv.name, conv.kind, conv.params, conv.macs) == ("0", "Conv2d", 108, 108 * 9)
    assert (conv.weight_bytes, conv.activation_bytes, conv.output_shape) == (432, 4 * 4 * 9, (1, 4, 3, 3))
    assert (norm.name, norm.kind, norm.params, norm.macs) == ("1", "BatchNorm2d", 8, 0)
    assert norm.weight_bytes == 4 * 4 * 4 + 8, "running statistics and the int64 step count are bytes, not parameters"
    assert (linear.name, linear.params, linear.macs, linear.dtype) == ("4", 74, 72, "float32")


def test_totals_are_sums_over_the_rows():
    report = cost_of(small(), torch.randn(2, 3, 5, 5))

    for total in ("params", "macs", "weight_bytes", "activation_bytes"):
        assert getattr(report, total) == sum(getattr(layer, total) for layer in report.layers)
    assert report.params == sum(parameter.numel() for parameter in small().parameters())


def test_the_batch_of_the_example_does_not_count():
    one, many = (cost_of(small(), torch.randn(rows, 3, 5, 5)) for rows in (2, 7))

    assert one == many


def test_a_fixed_batch_counts_as_it_is():
    fixed = cost_of(small(), torch.randn(3, 3, 5, 5), batch_dim=None)

    assert fixed.macs == 3 * cost_of(small(), torch.randn(3, 3, 5, 5)).macs


def test_other_dynamic_sizes_are_those_of_the_example():
    model = nn.Conv2d(3, 4, 3)

    dynamic = cost_of(model, torch.randn(2, 3, 9, 7), dynamic={"input": (2, 3)})

    assert dynamic.macs == model.weight.numel() * 7 * 5
    assert dynamic.layers[0].output_shape == (1, 4, 7, 5)


def test_a_layer_called_twice_owns_its_parameters_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(self.layer(x).relu())

    first, second = cost_of(Twice(), inputs(2, 4).float()).layers

    assert [first.name, second.name] == ["layer", "layer@1"]
    assert [first.params, second.params] == [20, 0]
    assert [first.weight_bytes, second.weight_bytes] == [80, 0]
    assert [first.macs, second.macs] == [16, 16]


def test_tied_parameters_are_counted_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.embed(x))

    embed, head = cost_of(Tied(), torch.randint(7, (2, 3))).layers

    assert (embed.params, head.params) == (28, 0)
    assert (embed.macs, head.macs) == (0, 3 * 28)


def test_parameters_outside_of_modules_have_a_row():
    class Position(nn.Module):
        def __init__(self):
            super().__init__()
            self.position = nn.Parameter(torch.zeros(3, 4))

        def forward(self, x):
            return x + self.position

    (row,) = cost_of(Position(), torch.randn(2, 3, 4)).layers

    assert (row.name, row.kind, row.params, row.macs) == ("add", "add.Tensor", 12, 0)


def test_meta_models_cost_the_same():
    report = cost_of(small().to("meta"), torch.empty(2, 3, 5, 5, device="meta"))

    assert report == cost_of(small(), torch.randn(2, 3, 5, 5))


def test_the_report_is_a_frozen_value_and_cached():
    program = trace(small().eval(), torch.randn(2, 3, 5, 5))

    report = program.analyze("cost")

    assert program.analyze("cost") is report
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.layers = ()


def test_an_overload_has_one_rule():
    with pytest.raises(ValueError, match="already counted"):
        counts(aten.linear.default)(lambda call: 0)
    assert RULES[aten.linear.default].__name__ == "_linear"
