"""cast: products and what stands between them in 16 bits, the rest as it was."""

import pytest
import torch
from fxcompress.passes.cast import Cast
from models import BERT_INPUTS, residual_net, run_pass, small_bert, small_vit
from torch import nn

import fxcompress as fxc
from fxcompress import InputError, trace


def vit():
    torch.manual_seed(0)
    return trace(small_vit().eval(), torch.randn(2, 3, 32, 32))


def dtypes(program):
    return {node.name: node.meta["val"].dtype for node in program.nodes if hasattr(node.meta.get("val"), "dtype")}


class Tied(nn.Module):
    """A head that reads the embedding's weight."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.embed(tokens))


@pytest.mark.parametrize(("dtype", "least_db"), [("float16", 60), ("bfloat16", 42)])
@pytest.mark.parametrize("make", [residual_net, small_vit, small_bert])
def test_outputs_stay_near_and_keep_their_dtype(make, dtype, least_db):
    torch.manual_seed(0)
    inputs = {
        residual_net: torch.randn(2, 3, 8, 8), small_vit: torch.randn(2, 3, 32, 32), small_bert: ((), BERT_INPUTS[0]),
    }[make]  # fmt: skip
    done = fxc.PassManager(f"cast{{dtype={dtype}}}").run(trace(make().eval(), inputs))
    (record,) = done.records
    assert record.changed
    assert record.statistics["layers"] > 0
    assert least_db < record.comparison.sqnr_db < 90


def test_products_narrow_and_the_residual_stream_and_norms_do_not(golden):
    after, result = run_pass(Cast(dtype="bfloat16"), vit())
    found = dtypes(after)
    assert result.statistics == {"layers": 7, "casts": 8}
    for narrow in ("blocks_0_attn_qkv", "scaled_dot_product_attention", "gelu", "blocks_0_mlp_fc2"):
        assert found[narrow] == torch.bfloat16
    for wide in ("blocks_0_norm1", "add_1", "norm"):
        assert found[wide] == torch.float32
    state = after.emit().state_dict()
    assert state["blocks.0.attn.qkv.weight"].dtype == torch.bfloat16
    assert state["blocks.0.norm1.weight"].dtype == torch.float32
    golden("cast-vit", after.text())


def test_a_tied_weight_stays_one_tensor_and_is_cast_where_it_is_read():
    program = trace(Tied().eval(), torch.randint(0, 11, (2, 5)))
    after, result = run_pass(Cast(), program)
    assert result.statistics == {"layers": 1, "casts": 3}
    module = after.emit()
    assert module.head.weight is module.embed.weight
    assert module.embed.weight.dtype == torch.float32


def test_twice_is_once():
    once, _ = run_pass(Cast(), vit())
    twice, result = run_pass(Cast(), once)
    assert not result.changed
    assert result.statistics == {"layers": 0, "casts": 0}
    assert twice.text() == once.text()


def test_skipped_layers_keep_32_bits():
    after, result = run_pass(Cast(skip=("blocks.0.mlp.*",)), vit())
    assert result.statistics["layers"] == 5
    assert dtypes(after)["blocks_0_mlp_fc1"] == torch.float32
    assert dtypes(after)["blocks_0_attn_qkv"] == torch.float16


def test_a_weight_that_does_not_fit_is_refused_by_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        model[0].weight[0, 0] = 1e5
    program = trace(model, torch.randn(2, 4))
    _, result = run_pass(Cast(), program)
    assert [(refusal.code, refusal.node) for refusal in result.refusals] == [("overflow", "_0")]
    assert result.statistics["layers"] == 1
    _, result = run_pass(Cast(dtype="bfloat16"), program)
    assert not result.refusals


def test_another_dtype_is_refused_by_name():
    program = trace(nn.Linear(4, 2).double().eval(), torch.randn(2, 4, dtype=torch.float64))
    _, result = run_pass(Cast(), program)
    assert [refusal.code for refusal in result.refusals] == ["not-float32"]
    assert not result.changed


def test_quantized_layers_are_left_alone():
    torch.manual_seed(0)
    program = trace(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), torch.randn(16, 8))
    task = fxc.Task(calibration=[torch.randn(16, 8)])
    done = fxc.PassManager("insert-qdq{skip=[_2] vnni=true},cast").run(program, task).program
    (weight,) = (node for node in done.nodes if node.name.startswith("dequantize_per_channel"))
    (layer,) = weight.users
    assert layer.meta["val"].dtype == torch.float32
    assert dtypes(done)["_2"] == torch.float16


def test_a_program_without_products_is_unchanged():
    _, result = run_pass(Cast(), trace(nn.LayerNorm(4).eval(), torch.randn(2, 4)))
    assert not result.changed


def test_it_trains_and_exports(tmp_path):
    after, _ = run_pass(Cast(dtype="bfloat16"), vit())
    module = after.emit()
    module(torch.randn(2, 3, 32, 32)).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in module.parameters())
    half, _ = run_pass(Cast(), vit())
    for suffix in (".onnx", ".xml", ".pt2"):
        fxc.export(half, tmp_path / f"half{suffix}")


def test_the_dtype_has_to_be_known():
    with pytest.raises(InputError, match="dtype must be one of float16, bfloat16, not 'int8'"):
        Cast(dtype="int8")
