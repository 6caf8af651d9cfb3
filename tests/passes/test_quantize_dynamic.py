"""quantize-dynamic: linear layers in int8, on grids that are found at each call."""

import pytest
import torch
from fxcompress.passes.quantization.layers import Floating
from fxcompress.passes.quantize_dynamic import QuantizeDynamic
from models import BERT_INPUTS, small_bert
from torch import nn

import fxcompress as fxc
from fxcompress.artifact import save
from fxcompress.engines import onnx_dynamic
from fxcompress.engines.executed import executed_layers


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 5)).eval()


def rows(count=8, width=16):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(1))


def quantized(model, x=None, **options):
    x = rows() if x is None else x
    done = fxc.PassManager([QuantizeDynamic(**options)]).run(fxc.trace(model, x))
    return done.program, done.records[0]


def test_linear_layers_read_integers_of_a_grid_of_their_own(golden):
    program, record = quantized(mlp(), vnni=True)
    assert record.result.changed
    assert record.result.refusals == ()
    assert record.result.statistics == {"layers": 2, "activations": 2}
    assert record.comparison.sqnr_db > 30
    golden("quantize-dynamic", program.text())


def test_the_grid_follows_the_values_of_the_call():
    model = mlp()
    program, _ = quantized(model)
    for scale in (1.0, 1e3):  # of grids for small values nothing would be left
        expected = model(scale * rows())
        assert (program(scale * rows()) - expected).abs().max() < 0.03 * expected.abs().max()


def test_readers_of_one_value_share_its_grid():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 4), nn.Linear(16, 4)

        def forward(self, x):
            return self.a(x) * self.b(x)

    _, record = quantized(Twice().eval())
    assert record.result.statistics == {"layers": 2, "activations": 1}


def test_one_layer_right_behind_another():
    model = nn.Sequential(nn.Linear(16, 4), nn.Linear(4, 16), nn.Linear(16, 5)).eval()
    program, record = quantized(model)
    assert record.result.statistics == {"layers": 3, "activations": 3}
    assert (program(rows()) - model(rows())).abs().max() < 0.05 * model(rows()).abs().max()


def test_shared_weights_stay_shared():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).eval()
    model[2].weight = model[0].weight
    program, record = quantized(model)
    assert record.result.statistics["layers"] == 2
    held = dict(program.graph_module.named_parameters(remove_duplicate=False))
    assert held["0.weight"] is held["2.weight"]


def test_twice_is_once_and_nothing_to_do_is_no_change():
    program, _ = quantized(mlp())
    again = fxc.PassManager([QuantizeDynamic()]).run(program)
    assert not again.records[0].changed
    assert again.program.text() == program.text()
    _, record = quantized(nn.Sequential(nn.ReLU()).eval())
    assert not record.changed


def test_what_is_skipped_stays():
    _, record = quantized(mlp(), skip=("2",))
    assert record.result.statistics["layers"] == 1


class Computed(nn.Module):
    def __init__(self):
        super().__init__()
        self.held = nn.Parameter(torch.randn(4, 16))

    def forward(self, x):
        return nn.functional.linear(x, self.held.tanh())


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.GRU(16, 8, batch_first=True)

    def forward(self, x):
        return self.cell(x)[0]


class Stored(Computed):
    def forward(self, x):
        return x @ self.held.T[:, :4] @ self.held


@pytest.mark.parametrize(
    ("model", "x", "code"),
    [
        (Recurrent().eval(), torch.randn(2, 3, 16), "no-integer-kernel"),
        (Stored().eval(), rows(), "constant-operand"),
        (nn.Sequential(nn.Linear(16, 0)).eval(), rows(), "empty-weight"),
        (Computed().eval(), rows(), "computed-weight"),
        (nn.Sequential(nn.Linear(16, 4)).double().eval(), rows().double(), "not-float32"),
    ],
)
def test_refusals(model, x, code):
    _, record = quantized(model, x)
    assert [refusal.code for refusal in record.result.refusals] == [code]
    assert not record.changed


def test_a_weight_that_is_not_finite_is_refused():
    program = fxc.trace(mlp(), rows()).copy()
    with torch.no_grad():
        program.graph_module.get_parameter("2.bias")[0] = torch.inf
    result = QuantizeDynamic().run(program, None)
    assert [(refusal.code, refusal.node) for refusal in result.refusals] == [("not-finite", "_2")]


def test_bits_out_of_range():
    with pytest.raises(fxc.InputError, match="weight_bits must be from 2 to 8, not 1"):
        QuantizeDynamic(weight_bits=1)


def test_a_saved_model_comes_back(tmp_path):
    program, _ = quantized(mlp())
    save(program, tmp_path / "m.pt2")
    assert torch.equal(fxc.load(tmp_path / "m.pt2")(rows()), program(rows()))


def test_it_learns_through_rounding():
    def loss(output, batch):
        return nn.functional.cross_entropy(output, batch[1])

    program, _ = quantized(mlp())
    task = fxc.Task(training=[(rows(32), torch.randint(0, 5, (32,)))], loss=loss)
    trained = fxc.PassManager("train{epochs=1}").run(program, task).program
    before, after = (dict(each.graph_module.named_parameters()) for each in (program, trained))
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_corrections_go_on_from_it():
    x = rows(64)
    before = fxc.trace(mlp(), x[:4])
    task = fxc.Task(calibration=list(x.split(16)))
    dynamic = "quantize-dynamic{weight-bits=4}"
    plain = fxc.PassManager(dynamic).run(before, task).program
    corrected = fxc.PassManager(f"{dynamic},correct-bias,refine-rounding").run(before, task).program
    expected = before(x)
    assert (corrected(x) - expected).square().sum() < 0.9 * (plain(x) - expected).square().sum()


def test_without_rounding_it_is_what_it_was():
    before = fxc.trace(mlp(), rows())
    program = fxc.PassManager("quantize-dynamic").run(before).program
    assert torch.equal(Floating(program.graph_module).run(rows())[0], before(rows()))


def test_onnxruntime_multiplies_integers(tmp_path):
    inputs, dynamic = BERT_INPUTS
    torch.manual_seed(0)
    before = fxc.trace(small_bert().eval(), ((), inputs), dynamic=dynamic)
    done = fxc.PassManager("quantize-dynamic{weight-bits=7}").run(before)
    fxc.export(done.program, tmp_path / "m.onnx")
    integer = [layer for layer in executed_layers(tmp_path / "m.onnx") if layer.integer]
    assert len(integer) == done.records[0].result.statistics["layers"] > 5
    assert {layer.operator for layer in integer} <= {"DynamicQuantizeMatMul", "MatMulIntegerToFloat"}


def test_a_product_of_integers_that_is_off_is_not_written(tmp_path, monkeypatch):
    right = onnx_dynamic._weight

    def wrong(*given):
        integers, scales = right(*given)
        return integers, 1.3 * scales

    program, _ = quantized(mlp(), weight_bits=7)
    monkeypatch.setattr(onnx_dynamic, "_weight", wrong)
    with pytest.raises(fxc.VerificationError, match="was not written"):
        fxc.export(program, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
