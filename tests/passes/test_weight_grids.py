"""The integers of weights: which scale each output channel gets."""

import pytest
import torch
from fxcompress.passes.quantization.weights import channel_axis, channel_scales
from torch import nn

from fxcompress import trace
from fxcompress.ir.ops import operation
from fxcompress.ir.weighted import weighted_layer

LAYERS = {
    "linear": (nn.Linear(16, 6), (2, 16)),
    "convolution": (nn.Conv2d(6, 8, 3), (2, 6, 5, 5)),
    "grouped": (nn.Conv2d(6, 4, 3, groups=2), (2, 6, 5, 5)),
    "transposed": (nn.ConvTranspose2d(6, 8, 3, groups=2), (2, 6, 5, 5)),
}


def layer_of(model, *shape):
    program = trace(model, torch.randn(*shape))
    calls = (operation(program.graph_module, node) for node in program.nodes)
    return next(layer for call in calls if call is not None and (layer := weighted_layer(call)) is not None)


@pytest.mark.parametrize("kind", LAYERS)
def test_neighbours_of_one_sign_fit_into_16_bits_together(kind):
    torch.manual_seed(0)
    model, shape = LAYERS[kind]
    nn.init.uniform_(model.weight, 0.5, 1.0)
    layer = layer_of(model, *shape)
    scales = channel_scales(layer, 0.1)
    axis = channel_axis(layer)
    integers = (model.weight / scales.view(*(-1 if dim == axis else 1 for dim in range(model.weight.dim())))).round()
    split = layer.layout.split(integers)  # (groups, outputs, inputs, *kernel)
    pairs = (split[:, :, 1::2] + split[:, :, ::2][:, :, : split.shape[2] // 2]).abs()
    assert 255 * pairs.max() <= 2**15 - 1
    assert pairs.max() >= 120


def test_a_depthwise_convolution_uses_the_whole_grid():
    model = nn.Conv2d(6, 6, 3, groups=6)
    scales = channel_scales(layer_of(model, 2, 6, 5, 5), 0.1)
    torch.testing.assert_close(scales, model.weight.detach().abs().flatten(1).amax(1) / 127)


@pytest.mark.parametrize("model", [nn.Conv2d(6, 12, 3, groups=6), nn.Conv2d(1, 4, 3), nn.Conv2d(1, 1, 3)], ids=str)
def test_neighbours_of_one_input_are_places_of_the_kernel(model):
    """Only a convolution of many groups with one input and one output each has kernels that add nothing in 16 bits."""
    nn.init.uniform_(model.weight, 0.5, 1.0)
    layer = layer_of(model, 2, model.in_channels, 5, 5)
    integers = (model.weight / channel_scales(layer, 0.1).view(-1, 1, 1, 1)).round().flatten(1)
    pairs = (integers[:, 1:] + integers[:, :-1]).abs()
    assert 255 * pairs.max() <= 2**15 - 1
    assert pairs.max() >= 120


@pytest.mark.parametrize("model", [nn.Conv2d(6, 12, 1, groups=6), nn.Linear(1, 3)], ids=str)
def test_a_single_weight_has_no_neighbour(model):
    shape = (2, 6, 5, 5) if model.weight.dim() > 2 else (2, 1)
    nn.init.zeros_(model.bias)
    scales = channel_scales(layer_of(model, *shape), 0.1)
    torch.testing.assert_close(scales, (model.weight.detach().abs().flatten(1)[:, 0] / 127).expand_as(scales))


def test_a_huge_weight_does_not_take_the_bias_away():
    model = nn.Conv2d(3, 3, 1, groups=3)
    with torch.no_grad():
        model.weight.view(-1).copy_(torch.tensor([1.0, 5000.0, 0.5]))
    layer = layer_of(model, 2, 3, 5, 5)
    free, bound = (channel_scales(layer, 0.1, result_scale=scale) for scale in (None, 0.03))
    assert bound.tolist() == pytest.approx([1 / 127, 2 * 0.03 / 0.1, 0.5 / 127])
    assert free.tolist() == pytest.approx([1 / 127, 5000 / 127, 0.5 / 127])


def test_neighbours_of_different_signs_use_the_whole_grid():
    model = nn.Linear(4, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -1.0, 1.0, -1.0], [1.0, 0.0, 0.0, 0.0]]))
    scales = channel_scales(layer_of(model, 2, 4), 0.1)
    assert torch.equal((model.weight / scales[:, None]).round().abs().amax(1), torch.tensor([127.0, 127.0]))
