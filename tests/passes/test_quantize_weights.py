"""quantize-weights: integers for weights alone, per channel or in groups."""

import pytest
import torch
from fxcompress.passes.quantize_weights import QuantizeWeights
from models import run_pass
from torch import nn

import fxcompress as fxc
from fxcompress import InputError, trace


class Words(nn.Module):
    """An embedding, two linear layers and a head that shares the embedding's weight."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(96, 64)
        self.first, self.second = nn.Linear(64, 256), nn.Linear(256, 64, bias=False)
        self.head = nn.Linear(64, 96, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.second(torch.relu(self.first(self.embed(tokens)))))


def words():
    torch.manual_seed(0)
    return trace(Words().eval(), torch.randint(0, 96, (2, 5)))


def convolutions():
    torch.manual_seed(0)
    return trace(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ConvTranspose2d(6, 4, 3)).eval(), torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize(("options", "step"), [({}, 1 / 127), ({"bits": 4, "group_size": 32}, 1 / 7)])
def test_weights_are_rounded_to_a_grid_of_their_own(options, step):
    before = words()
    after, result = run_pass(QuantizeWeights(**options), before)
    assert result.changed
    assert result.statistics == {"layers": 4}
    nodes = [node for node in after.nodes if "dequantize" in node.name]
    weight = before.graph_module.first.weight.detach()
    rounded = torch.fx.Interpreter(after.graph_module, garbage_collect_values=False)
    rounded.run(*before.interface.leaves)
    found = next(rounded.env[node] for node in nodes if node.meta["val"].shape == weight.shape)
    parts = weight.unflatten(1, (-1, options.get("group_size", 64)))
    largest = parts.abs().amax(-1, keepdim=True)
    error = (found - weight).view_as(parts).abs() / largest
    assert error.max() <= step / 2 * 1.001
    assert error.max() > step / 4


def test_convolutions_per_channel():
    after, result = run_pass(QuantizeWeights(), convolutions())
    assert result.statistics == {"layers": 2}
    assert [node.args[3] for node in after.nodes if node.name.startswith("quantize")] == [0, 1]


def test_a_tied_weight_has_one_set_of_scales_and_weights_stay_trainable():
    after, _ = run_pass(QuantizeWeights(bits=4, group_size=32), words())
    state = after.emit().state_dict()
    assert sum(name.endswith("weight_scale") for name in state) == 3
    assert {"embed.weight", "first.weight"} <= set(dict(after.emit().named_parameters()))


def test_a_weight_that_is_tied_to_a_transposed_convolution_has_scales_for_both():
    class There(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 3, 3, 3) * torch.logspace(-2, 0, 6).view(-1, 1, 1, 1))

        def forward(self, x):
            return nn.functional.conv_transpose2d(nn.functional.conv2d(x, self.weight), self.weight)

    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    after, result = run_pass(QuantizeWeights(), trace(There().eval(), x))
    assert result.statistics == {"layers": 2}
    scales = [node.args[1] for node in after.nodes if node.name.startswith("quantize")]
    weight = after.graph_module.weight
    for scale, axis in zip(scales, (0, 1), strict=True):
        held = after.graph_module.get_buffer(str(scale.target))
        torch.testing.assert_close(held, weight.transpose(0, axis).flatten(1).abs().amax(1).detach() / 127)


def test_twice_is_once():
    once, _ = run_pass(QuantizeWeights(), words())
    twice, result = run_pass(QuantizeWeights(), once)
    assert not result.changed
    assert twice.text() == once.text()


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.bilinear = nn.GRU(16, 8, batch_first=True), nn.Parameter(torch.randn(8, 4))

    def forward(self, x):
        return self.cell(x)[0] @ self.bilinear


def test_weights_of_what_is_no_layer_and_layers_without_weights():
    _, result = run_pass(QuantizeWeights(), trace(Recurrent().eval(), torch.randn(2, 3, 16)))
    assert [(refusal.code, refusal.node) for refusal in result.refusals] == [
        ("no-integer-kernel", "gru"),
        ("constant-operand", "matmul"),
    ]
    _, result = run_pass(QuantizeWeights(), trace(nn.Sequential(nn.Linear(4, 0)).eval(), torch.randn(2, 4)))
    assert [refusal.code for refusal in result.refusals] == ["empty-weight"]
    assert not result.changed


def test_refusals():
    _, result = run_pass(QuantizeWeights(group_size=2), convolutions())
    assert [refusal.code for refusal in result.refusals] == ["not-a-matrix", "not-a-matrix"]
    assert not result.changed
    _, result = run_pass(QuantizeWeights(bits=4, group_size=48), words())
    assert {refusal.code for refusal in result.refusals} == {"group-size"}
    program = trace(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4))
    program.graph_module.get_submodule("0").weight = nn.Parameter(torch.full((4, 4), float("nan")))
    assert [refusal.code for refusal in QuantizeWeights().run(program, None).refusals] == ["not-finite"]


def test_skip_and_options():
    _, result = run_pass(QuantizeWeights(skip=("embed", "head")), words())
    assert result.statistics == {"layers": 2}
    for options in ({"bits": 1}, {"bits": 9}, {"group_size": 1}):
        with pytest.raises(InputError):
            QuantizeWeights(**options)


def test_a_zero_weight():
    model = nn.Linear(4, 4)
    nn.init.zeros_(model.weight)
    x = torch.randn(2, 4)
    after, _ = run_pass(QuantizeWeights(), trace(model, x))
    torch.testing.assert_close(after(x), model(x))


@pytest.mark.parametrize(("suffix", "least"), [(".onnx", 6), (".xml", 6), (".pt2", 3)])
def test_a_file_in_groups_of_four_bits_is_small(suffix, least, tmp_path):
    torch.manual_seed(0)
    layers = [nn.Linear(512, 512, bias=False), nn.ReLU(), nn.Linear(512, 512, bias=False)]
    before = trace(nn.Sequential(*layers).eval(), torch.randn(2, 512))
    after, _ = run_pass(QuantizeWeights(bits=4, group_size=32), before)
    size = fxc.export(after, tmp_path / f"m{suffix}").size
    weights = sum(parameter.nbytes for parameter in before.graph_module.parameters())
    assert weights / size > least


@pytest.mark.parametrize("options", [{}, {"bits": 4, "group_size": 32}])
def test_embeddings_and_tied_weights_can_be_exported(options, tmp_path):
    after, _ = run_pass(QuantizeWeights(**options), words())
    assert fxc.export(after, tmp_path / "m.onnx").size < 0.6 * sum(p.nbytes for p in words().graph_module.parameters())
