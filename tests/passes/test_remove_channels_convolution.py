"""remove-channels in convolutional networks: each structure is pruned exactly, and as far as it can be."""

import pytest
import torch
from models import inputs
from pruning import Wire, lengths, prune, shapes, weight
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
CONV_TRANSPOSE = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
IMAGE = inputs(2, 3, 8, 8)


def conv(c_in, c_out, kernel=1, **options):
    return nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, **options)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_chain_in_any_number_of_dims(dims):
    model = nn.Sequential(CONV[dims](3, 8, 3), NORM[dims](8), nn.ReLU(), CONV[dims](8, 5, 3, padding="same"))

    after = prune(model, inputs(2, 3, *(6,) * dims))

    assert shapes(after) == {"0": (4, 3, *(3,) * dims), "3": (5, 4, *(3,) * dims)}
    assert lengths(after) == {
        "0.bias": 4,
        "1.weight": 4,
        "1.bias": 4,
        "1.running_mean": 4,
        "1.running_var": 4,
        "3.bias": 5,
    }
    assert after.graph_module.get_submodule("1").num_features == 4


def test_residual_stream_is_one_group():
    model = Wire(
        lambda m, x: m.head((m.stem(x) + m.second(m.first(m.stem(x)).relu())).relu()),
        stem=conv(3, 8), first=conv(8, 6, 3), second=conv(6, 8, 3), head=conv(8, 2),
    )  # fmt: skip

    after = prune(model, IMAGE)

    assert shapes(after) == {"stem": (4, 3, 1, 1), "first": (3, 4, 3, 3), "second": (4, 3, 3, 3), "head": (2, 4, 1, 1)}


def test_dense_concatenation():
    def forward(m, x):
        found = [m.stem(x)]
        for layer in (m.a, m.b, m.c):
            found.append(layer(torch.cat(found, 1)).relu())
        return m.head(torch.cat(found, 1))

    after = prune(
        Wire(forward, stem=conv(3, 8), a=conv(8, 4, 3), b=conv(12, 4, 3), c=conv(16, 4), head=conv(20, 2)), IMAGE
    )

    assert shapes(after) == {
        "stem": (4, 3, 1, 1), "a": (2, 4, 3, 3), "b": (2, 6, 3, 3), "c": (2, 8, 1, 1), "head": (2, 10, 1, 1),
    }  # fmt: skip


def test_depthwise_convolution():
    model = nn.Sequential(conv(3, 8), conv(8, 8, 3, groups=8), nn.BatchNorm2d(8), conv(8, 5))

    after = prune(model, IMAGE)

    assert shapes(after) == {"0": (4, 3, 1, 1), "1": (4, 1, 3, 3), "3": (5, 4, 1, 1)}
    assert after.graph_module.get_submodule("1").groups == 4


def test_depthwise_convolution_with_a_multiplier():
    after = prune(nn.Sequential(conv(3, 8), conv(8, 16, 3, groups=8), conv(16, 5)), IMAGE)

    assert shapes(after) == {"0": (4, 3, 1, 1), "1": (4, 1, 3, 3), "2": (5, 4, 1, 1)}


def test_grouped_convolution_loses_groups_and_channels_of_each_group():
    after = prune(nn.Sequential(conv(3, 16), conv(16, 24, 3, groups=4), conv(24, 5)), IMAGE)

    assert shapes(after) == {"0": (4, 3, 1, 1), "1": (6, 2, 3, 3), "2": (5, 6, 1, 1)}
    assert after.graph_module.get_submodule("1").groups == 2


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_transposed_convolution(dims):
    up = CONV_TRANSPOSE[dims]
    model = nn.Sequential(
        up(3, 8, 2, stride=2), nn.ReLU(), up(8, 6, 3, output_padding=1, stride=2), CONV[dims](6, 2, 1)
    )

    after = prune(model, inputs(2, 3, *(4,) * dims))

    assert shapes(after) == {"0": (3, 4, *(2,) * dims), "2": (4, 3, *(3,) * dims), "3": (2, 3, *(1,) * dims)}


def test_grouped_transposed_convolution():
    model = nn.Sequential(conv(3, 16), nn.ConvTranspose2d(16, 24, 2, stride=2, groups=4), conv(24, 5))

    after = prune(model, IMAGE)

    assert shapes(after) == {"0": (4, 3, 1, 1), "1": (4, 3, 2, 2), "2": (5, 6, 1, 1)}
    assert after.graph_module.get_submodule("1").groups == 2


@pytest.mark.parametrize("affine", [True, False])
def test_instance_norm(affine):
    after = prune(nn.Sequential(conv(3, 8), nn.InstanceNorm2d(8, affine=affine), nn.ReLU(), conv(8, 2)), IMAGE)

    assert shapes(after) == {"0": (4, 3, 1, 1), "3": (2, 4, 1, 1)}


@pytest.mark.parametrize(("groups", "left", "channels"), [(1, 1, 4), (2, 1, 2), (4, 2, 2), (8, 4, 4)])
def test_group_norm_loses_groups_and_channels_of_each_group(groups, left, channels):
    model = nn.Sequential(conv(3, 8), nn.GroupNorm(groups, 8), nn.ReLU(), conv(8, 2))

    after = prune(model, IMAGE)

    assert shapes(after) == {"0": (channels, 3, 1, 1), "3": (2, channels, 1, 1)}
    assert after.graph_module.get_submodule("1").num_groups == left
    assert after.graph_module.get_submodule("1").num_channels == channels


def test_flatten_to_linear_takes_all_places_of_a_channel():
    model = nn.Sequential(conv(3, 8, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 6), nn.Linear(6, 5))

    after = prune(model, IMAGE)

    assert shapes(after) == {"0": (4, 3, 3, 3), "3": (3, 16), "4": (5, 3)}


def test_squeeze_and_excitation():
    def forward(m, x):
        x = m.stem(x)
        return m.head(x * m.expand(m.reduce(x.mean((2, 3), keepdim=True)).relu()).sigmoid())

    after = prune(Wire(forward, stem=conv(3, 8), reduce=conv(8, 4), expand=conv(4, 8), head=conv(8, 2)), IMAGE)

    assert shapes(after) == {
        "stem": (4, 3, 1, 1), "reduce": (2, 4, 1, 1), "expand": (4, 2, 1, 1), "head": (2, 4, 1, 1),
    }  # fmt: skip


@pytest.mark.parametrize("gate", ["glu", "chunk", "slices", "split"])
def test_gated_channels_go_in_both_halves(gate):
    def forward(m, x):
        x = m.both(x)
        if gate == "glu":
            return m.head(F.glu(x, 1))
        if gate == "slices":
            a, b = x[:, :8], x[:, 8:]
        else:
            a, b = x.chunk(2, 1) if gate == "chunk" else x.split([8, 8], 1)
        return m.head(a * b.sigmoid())

    after = prune(Wire(forward, both=conv(3, 16), head=conv(8, 2)), IMAGE)

    assert shapes(after) == {"both": (8, 3, 1, 1), "head": (2, 4, 1, 1)}


def shuffle(x, groups):
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


@pytest.mark.parametrize("shuffled", [shuffle, F.channel_shuffle])
def test_channel_shuffles_do_not_bind_channels(shuffled):
    def forward(m, x):
        x = m.stem(x)
        for layer in (m.a, m.b, m.c):
            left, right = x.chunk(2, 1)
            x = shuffled(torch.cat([left, layer(right)], 1), 2)
        return m.head(x)

    layers = {name: conv(16, 16, 3) for name in "abc"}
    after = prune(Wire(forward, stem=conv(3, 32), **layers, head=conv(32, 2)), IMAGE)

    assert shapes(after)["stem"] == (16, 3, 1, 1)
    assert shapes(after)["head"] == (2, 16, 1, 1)


def test_grouped_convolutions_with_a_shuffle_between():
    def forward(m, x):
        return m.head(m.second(shuffle(m.first(m.stem(x)), 4)))

    model = Wire(
        forward, stem=conv(3, 16), first=conv(16, 16, groups=4), second=conv(16, 16, groups=4), head=conv(16, 2)
    )
    after = prune(model, IMAGE)

    assert shapes(after)["stem"][0] <= 8
    assert shapes(after)["head"][1] <= 8


ORDER = torch.tensor([5, 0, 1, 9, 9, 14, 2, 11])


@pytest.mark.parametrize(
    "lookup",
    [
        lambda m, x: x[:, m.order],
        lambda m, x: x.index_select(1, m.order),
        lambda m, x: x[:, [5, 0, 1, 9, 9, 14, 2, 11]],
        lambda m, x: x.flip(1)[:, ::2],
        lambda m, x: torch.roll(x, 3, 1)[:, 4:12],
        lambda m, x: x[:, torch.arange(16) % 2 == 0],
    ],
    ids=["index", "index_select", "list", "flip", "roll", "mask"],
)
def test_constant_lookups_take_channels_along(lookup):
    model = Wire(lambda m, x: m.head(lookup(m, m.stem(x))), stem=conv(3, 16), head=conv(8, 2))
    model.register_buffer("order", ORDER, persistent=False)

    after = prune(model, IMAGE)

    assert shapes(after)["stem"][0] < 12
    assert shapes(after)["head"][1] < 6


def test_pixel_shuffle_takes_all_places_of_a_channel():
    after = prune(nn.Sequential(conv(3, 32, 3), nn.PixelShuffle(2), conv(8, 2)), IMAGE)

    assert shapes(after) == {"0": (16, 3, 3, 3), "2": (2, 4, 1, 1)}


def test_pixel_unshuffle_keeps_all_places_of_a_channel():
    after = prune(nn.Sequential(conv(3, 8, 3), nn.PixelUnshuffle(2), conv(32, 2)), IMAGE)

    assert shapes(after) == {"0": (4, 3, 3, 3), "2": (2, 16, 1, 1)}


def test_space_to_depth_by_slices():
    def forward(m, x):
        x = m.stem(x)
        return m.head(torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1))

    after = prune(Wire(forward, stem=conv(3, 8), head=conv(32, 2)), IMAGE)

    assert shapes(after) == {"stem": (4, 3, 1, 1), "head": (2, 16, 1, 1)}


def test_u_net_skips():
    def forward(m, x):
        first = m.down1(x).relu()
        second = m.down2(F.max_pool2d(first, 2)).relu()
        third = m.down3(F.avg_pool2d(second, 2)).relu()
        x = m.up2(torch.cat([F.interpolate(third, scale_factor=2.0), second], 1)).relu()
        return m.up1(torch.cat([F.interpolate(x, size=first.shape[2:], mode="bilinear"), first], 1))

    model = Wire(
        forward, down1=conv(3, 4, 3), down2=conv(4, 8, 3), down3=conv(8, 16, 3), up2=conv(24, 8, 3), up1=conv(12, 2, 3)
    )
    after = prune(model, IMAGE)

    assert shapes(after) == {
        "down1": (2, 3, 3, 3), "down2": (4, 2, 3, 3), "down3": (8, 4, 3, 3), "up2": (4, 12, 3, 3), "up1": (2, 6, 3, 3),
    }  # fmt: skip


def test_branches_that_exchange_at_several_resolutions():
    def forward(m, x):
        fine, coarse = m.fine(x), m.coarse(F.avg_pool2d(x, 2))
        fine, coarse = fine + F.interpolate(m.up(coarse), scale_factor=2.0), coarse + m.down(fine)
        return m.head(torch.cat([fine, F.interpolate(coarse, scale_factor=2.0)], 1))

    model = Wire(
        forward, fine=conv(3, 4, 3), coarse=conv(3, 8, 3), up=conv(8, 4), down=nn.Conv2d(4, 8, 2, 2), head=conv(12, 2)
    )
    after = prune(model, IMAGE)

    assert shapes(after) == {
        "fine": (2, 3, 3, 3), "coarse": (4, 3, 3, 3), "up": (2, 4, 1, 1), "down": (4, 2, 2, 2), "head": (2, 6, 1, 1),
    }  # fmt: skip


def test_inception_branches():
    def forward(m, x):
        return m.head(torch.cat([m.one(x), m.three(m.squeeze(x)), m.pool(F.max_pool2d(x, 3, 1, 1))], 1))

    model = Wire(forward, one=conv(3, 4), squeeze=conv(3, 2), three=conv(2, 6, 3), pool=conv(3, 4), head=conv(14, 2))
    after = prune(model, IMAGE)

    assert shapes(after) == {
        "one": (2, 3, 1, 1), "squeeze": (1, 3, 1, 1), "three": (3, 1, 3, 3), "pool": (2, 3, 1, 1), "head": (2, 7, 1, 1),
    }  # fmt: skip


def test_cross_stage_partial_split():
    def forward(m, x):
        left, right = m.stem(x).chunk(2, 1)
        return m.head(torch.cat([left, m.b(m.a(right).relu()) + right], 1))

    after = prune(Wire(forward, stem=conv(3, 16), a=conv(8, 6, 3), b=conv(6, 8, 3), head=conv(16, 2)), IMAGE)

    assert shapes(after) == {"stem": (8, 3, 1, 1), "a": (3, 4, 3, 3), "b": (4, 3, 3, 3), "head": (2, 8, 1, 1)}


def test_res2net_scales():
    def forward(m, x):
        pieces = m.stem(x).split(4, 1)
        found, carried = [pieces[0]], 0
        for piece, layer in zip(pieces[1:], (m.a, m.b, m.c), strict=True):
            carried = layer(piece + carried).relu()
            found.append(carried)
        return m.head(torch.cat(found, 1))

    model = Wire(forward, stem=conv(3, 16), a=conv(4, 4, 3), b=conv(4, 4, 3), c=conv(4, 4, 3), head=conv(16, 2))
    after = prune(model, IMAGE)

    assert shapes(after) == {
        "stem": (8, 3, 1, 1), "a": (2, 2, 3, 3), "b": (2, 2, 3, 3), "c": (2, 2, 3, 3), "head": (2, 8, 1, 1),
    }  # fmt: skip


@pytest.mark.parametrize("how", ["pad", "cat"])
def test_zero_padded_shortcut(how):
    def forward(m, x):
        x = m.stem(x)
        short = F.avg_pool2d(x, 2)
        if how == "pad":
            short = F.pad(short, (0, 0, 0, 0, 2, 2))
        else:
            zeros = short.new_zeros(short.shape[0], 2, *short.shape[2:])
            short = torch.cat([zeros, short, zeros], 1)
        return m.head(short + m.body(x))

    after = prune(Wire(forward, stem=conv(3, 4), body=nn.Conv2d(4, 8, 2, 2), head=conv(8, 2)), IMAGE)

    assert shapes(after) == {"stem": (2, 3, 1, 1), "body": (4, 2, 2, 2), "head": (2, 4, 1, 1)}


def test_layer_scale_and_other_vectors_of_a_channel():
    def forward(m, x):
        x = m.stem(x)
        return m.head(x + m.gamma.view(-1, 1, 1) * m.body(x) + m.offset)

    model = Wire(
        forward, stem=conv(3, 8), body=conv(8, 8, 3), gamma=weight(8), offset=weight(1, 8, 1, 1), head=conv(8, 2)
    )
    after = prune(model, IMAGE)

    assert shapes(after) == {
        "offset": (1, 4, 1, 1), "stem": (4, 3, 1, 1), "body": (4, 4, 3, 3), "head": (2, 4, 1, 1),
    }  # fmt: skip
    assert lengths(after)["gamma"] == 4


def test_prelu_with_a_slope_for_each_channel():
    after = prune(nn.Sequential(conv(3, 8), nn.PReLU(8), conv(8, 2)), IMAGE)

    assert lengths(after) == {"0.bias": 4, "1.weight": 4, "2.bias": 2}


def test_channel_attention_by_a_convolution_over_channels_keeps_them():
    def forward(m, x):
        x = m.stem(x)
        attention = m.across(x.mean((2, 3))[:, None]).transpose(1, 2)[..., None]
        return m.head(x * attention.sigmoid())

    after = prune(Wire(forward, stem=conv(3, 8), across=nn.Conv1d(1, 1, 3, padding=1), head=conv(8, 2)), IMAGE)

    assert shapes(after) == {"stem": (8, 3, 1, 1), "across": (1, 1, 3), "head": (2, 8, 1, 1)}


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(
    ("groups", "offset_groups", "inputs_left", "groups_left"),
    [(1, 1, 8, 1), (1, 2, 8, 1), (4, 1, 4, 2), (2, 4, 8, 2), (4, 2, 4, 2)],
)
def test_deformable_convolution_keeps_offsets_and_their_groups(groups, offset_groups, inputs_left, groups_left, masked):
    layer = pytest.importorskip("torchvision.ops").DeformConv2d(16, 16, 3, padding=1, groups=groups, bias=masked)

    def forward(m, x):
        x = m.stem(x)
        return m.head(m.deform(x, m.offset(x), m.mask(x).sigmoid() if masked else None))

    offset, mask = conv(16, 18 * offset_groups, 3), conv(16, 9 * offset_groups)
    after = prune(Wire(forward, stem=conv(3, 16), offset=offset, mask=mask, deform=layer, head=conv(16, 2)), IMAGE)

    assert shapes(after)["stem"] == (inputs_left, 3, 1, 1)
    assert shapes(after)["offset"] == (18 * offset_groups, inputs_left, 3, 3)
    assert shapes(after)["deform"] == (inputs_left, inputs_left // groups_left, 3, 3)


@pytest.mark.filterwarnings("ignore:The tensor attribute")
@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm, nn.utils.weight_norm])
def test_reparametrised_weights(norm):
    after = prune(nn.Sequential(conv(3, 8, 3), nn.ReLU(), norm(conv(8, 8, 3)), conv(8, 2)), IMAGE)

    assert shapes(after)["3"] == (2, 4, 1, 1)
    assert shapes(after)["0"][0] in (4, 8)
