"""insert-qdq on processors with and without an integer dot product."""

import pytest
import torch
from fxcompress.passes.insert_qdq import InsertQdq
from fxcompress.passes.quantization import processor
from models import small_vit
from torch import nn

from fxcompress import PassManager, Task, trace


def images(rows):
    return torch.randn(rows, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def quantized(model, x, **options):
    torch.manual_seed(0)
    done = PassManager([InsertQdq(**options)]).run(trace(model.eval(), x[:2]), Task(calibration=[x]))
    return done.program, done.records[0].result


def test_without_it_openvino_keeps_products_in_floating_point():
    program, result = quantized(small_vit(), images(8), vnni=False)
    slow = {refusal.node for refusal in result.refusals if refusal.code == "slower-in-integers"}
    assert result.statistics["layers"] == 1
    blocks = {f"blocks_0_{name}" for name in ("attn_qkv", "attn_proj", "mlp_fc1", "mlp_fc2")}
    assert slow == {*blocks, "head", "scaled_dot_product_attention"}
    assert "set vnni=true" in result.refusals[0].reason
    assert any(node.name.startswith("scaled_dot_product_attention") for node in program.nodes)


@pytest.mark.parametrize("options", [{"vnni": True}, {"vnni": False, "target": "onnxruntime"}])
def test_otherwise_they_are_integers(options):
    _, result = quantized(small_vit(), images(8), **options)
    assert result.refusals == ()
    assert result.statistics["layers"] == 6


@pytest.mark.parametrize(("vnni", "largest"), [(True, 127), (False, 64)])
def test_with_it_all_weights_use_the_whole_grid(vnni, largest):
    model = nn.Conv2d(4, 2, 1)
    nn.init.ones_(model.weight)
    program, _ = quantized(nn.Sequential(model), torch.randn(8, 4, 5, 5), vnni=vnni)
    scale = next(value for name, value in program.graph_module.named_buffers() if name.endswith("weight_scale"))
    torch.testing.assert_close(1 / scale, torch.full((2,), float(largest)), atol=0.5, rtol=0)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"architecture": "x86_64", "avx2": True, "avx_vnni": False}, False),
        ({"architecture": "x86_64", "avx512_vnni": True}, True),
        ({"architecture": "x86_64", "amx_int8": True}, True),
        ({"architecture": "aarch64"}, True),
    ],
)
def test_nothing_given_asks_this_machine(capabilities, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert processor.has_vnni() is expected
    _, result = quantized(nn.Sequential(nn.Linear(4, 3)), torch.randn(8, 4))
    assert result.statistics["layers"] == expected
