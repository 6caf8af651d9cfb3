"""Productions over images (N, channels, 4, 4): each draws a module, and says how many channels it gives.

The wirings are those of published networks; sizes are as small as keeps every structure.
"""

import torch
from hypothesis import strategies as st
from pruning import Wire, weight
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

SIDE = 4


def pick(draw, *values):
    return draw(st.sampled_from(values))


def divisor(draw, number, most=4):
    return pick(draw, *(d for d in range(1, most + 1) if number % d == 0))


def width(draw):
    """A number of channels that has something to lose."""
    return pick(draw, 4, 3, 5, 6, 8)


def conv(c_in, c_out, kernel=1, **options):
    return nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, **options)


def chain(draw, channels, most=2):
    """Up to ``most`` productions in a row."""
    layers = []
    for _ in range(draw(st.integers(1, most))):
        layer, channels = pick(draw, *SIMPLE)(draw, channels)
        layers.append(layer)
    return nn.Sequential(*layers), channels


def chain_to(draw, channels, wanted):
    """Productions that end in a given number of channels."""
    body, out = chain(draw, channels)
    return nn.Sequential(body, conv(out, wanted, pick(draw, 1, 3)))


# --- plain layers ----------------------------------------------------------------------------------------------------


def convolution(draw, channels):
    groups = divisor(draw, channels)
    out = width(draw) if groups == 1 else groups * draw(st.integers(1, 3))
    return conv(channels, out, pick(draw, 1, 3), groups=groups, bias=draw(st.booleans())), out


def depthwise(draw, channels):
    out = channels * draw(st.integers(1, 2))
    return nn.Sequential(conv(channels, out, 3, groups=channels), nn.ReLU6()), out


def transposed(draw, channels):
    groups = divisor(draw, channels)
    out = groups * draw(st.integers(1, 3))
    return nn.Sequential(nn.ConvTranspose2d(channels, out, 2, 2, groups=groups), nn.MaxPool2d(2)), out


def in_three_dims(draw, channels):
    out = width(draw)
    layers = {"conv": nn.Conv3d(channels, out, (2, 3, 3), padding=(1, 1, 1)), "norm": nn.BatchNorm3d(out)}
    return Wire(lambda m, x: m.norm(m.conv(x[:, :, None])).amax(2), **layers), out


def normed_weight(draw, channels):
    out = width(draw)
    return weight_norm(conv(channels, out), dim=pick(draw, 0, 1)), out


def by_einsum(draw, channels):
    out = width(draw)
    return Wire(lambda m, x: torch.einsum("nchw,oc->nohw", x, m.kernel), kernel=weight(out, channels)), out


def over_channels(draw, channels):
    def wiring(m, x):
        return F.layer_norm(x.permute(0, 2, 3, 1), (channels,), m.gain, m.offset).permute(0, 3, 1, 2)

    return Wire(wiring, gain=weight(channels), offset=weight(channels)), channels


def norm(draw, channels):
    kind = pick(draw, "batch", "group", "instance", "channels")
    if kind == "channels":
        return over_channels(draw, channels)
    if kind == "group":
        return nn.GroupNorm(divisor(draw, channels), channels), channels
    made = nn.BatchNorm2d(channels) if kind == "batch" else nn.InstanceNorm2d(channels, affine=draw(st.booleans()))
    return made, channels


def activation(draw, channels):
    return pick(draw, nn.ReLU(), nn.GELU(), nn.Hardswish(), nn.PReLU(channels), nn.PReLU(), nn.Tanh()), channels


def scale(draw, channels):
    shape = pick(draw, (1, channels, 1, 1), (channels, 1, 1))
    return Wire(lambda m, x: x * m.gain + m.offset, gain=weight(*shape), offset=weight(*shape)), channels


# --- channels that move ----------------------------------------------------------------------------------------------


def shuffled(x, groups):
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def shuffle(draw, channels):
    groups, way = divisor(draw, channels), pick(draw, shuffled, F.channel_shuffle)
    return Wire(lambda m, x: way(x, groups)), channels


def reorder(draw, channels):
    order = draw(st.lists(st.integers(0, channels - 1), min_size=2, max_size=channels + 2))
    shift = draw(st.integers(1, channels))
    ways = (lambda m, x: x[:, order], lambda m, x: x.flip(1), lambda m, x: torch.roll(x, shift, 1))
    which = draw(st.integers(0, 2))
    return Wire(ways[which]), len(order) if which == 0 else channels


def part(draw, channels):
    start, step = draw(st.integers(0, channels - 1)), draw(st.integers(1, 2))
    return Wire(lambda m, x: x[:, start::step]), len(range(start, channels, step))


def padded(draw, channels):
    before, after = draw(st.integers(0, 2)), draw(st.integers(0, 3))
    out = before + channels + after
    made = Wire(lambda m, x: F.pad(x, (0, 0, 0, 0, before, after)) + m.body(x), body=chain_to(draw, channels, out))
    return made, out


def pixels(draw, channels):
    out = draw(st.integers(2, 4))
    if draw(st.booleans()):
        return nn.Sequential(conv(channels, 4 * out), nn.PixelShuffle(2), nn.AvgPool2d(2)), out
    return nn.Sequential(nn.PixelUnshuffle(2), conv(4 * channels, 4 * out, 3), nn.PixelShuffle(2)), out


def focus(draw, channels):
    def wiring(m, x):
        x = torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)
        return F.interpolate(m.mix(x), scale_factor=2.0, mode="nearest")

    out = width(draw)
    return Wire(wiring, mix=conv(4 * channels, out)), out


def maxout(draw, channels):
    pieces, out = draw(st.integers(2, 3)), width(draw)
    inner = draw(st.booleans())

    def wiring(m, x):
        x = m.conv(x)
        if inner:
            return x.view(x.shape[0], out, pieces, *x.shape[2:]).amax(2)
        return x.unflatten(1, (pieces, out)).amax(1)

    return Wire(wiring, conv=conv(channels, pieces * out)), out


# --- structures ------------------------------------------------------------------------------------------------------


def residual(draw, channels):
    return Wire(lambda m, x: (x + m.body(x)).relu(), body=chain_to(draw, channels, channels)), channels


def dense(draw, channels):
    body, out = chain(draw, channels)
    return Wire(lambda m, x: torch.cat([x, m.body(x)], 1), body=body), channels + out


def branches(draw, channels):
    (a, left), (b, right) = chain(draw, channels), chain(draw, channels)
    return Wire(lambda m, x: torch.cat([m.a(x), m.b(x)], 1), a=a, b=b), left + right


def selective(draw, channels):
    def wiring(m, x):
        both = torch.stack([m.a(x), m.b(x)], 1)
        weights = m.mix(both.sum(1).mean((2, 3))).view(-1, 2, out).softmax(1)
        return (both * weights[..., None, None]).sum(1)

    out = width(draw)
    return Wire(wiring, a=chain_to(draw, channels, out), b=conv(channels, out), mix=nn.Linear(out, 2 * out)), out


def squeeze_excite(draw, channels):
    def wiring(m, x):
        return x * m.up(m.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid().expand_as(x)

    inner = width(draw)
    return Wire(wiring, down=conv(channels, inner), up=conv(inner, channels)), channels


def gated(draw, channels):
    out, way = width(draw), pick(draw, "glu", "chunk", "split")

    def wiring(m, x):
        x = m.both(x)
        if way == "glu":
            return F.glu(x, 1)
        a, b = x.chunk(2, 1) if way == "chunk" else x.split(out, 1)
        return a * b.tanh()

    return Wire(wiring, both=conv(channels, 2 * out)), out


def partial(draw, channels):
    if channels < 2:
        return convolution(draw, channels)
    first = draw(st.integers(1, channels - 1))
    body, out = chain(draw, channels - first)

    def wiring(m, x):
        left, right = x.split([first, channels - first], 1)
        return torch.cat([m.body(right), left], 1)

    return Wire(wiring, body=body), first + out


def scales(draw, channels):
    pieces = divisor(draw, channels)
    width = channels // pieces

    def wiring(m, x):
        first, *rest = x.chunk(pieces, 1)
        found, carried = [first], 0
        for piece, layer in zip(rest, m.layers, strict=True):
            carried = layer(piece + carried)
            found.append(carried)
        return torch.cat(found, 1)

    layers = nn.ModuleList(conv(width, width, 3) for _ in range(pieces - 1))
    return Wire(wiring, layers=layers), channels


def u_shape(draw, channels):
    def wiring(m, x):
        return torch.cat([x, F.interpolate(m.body(F.max_pool2d(x, 2)), size=x.shape[2:], mode="nearest")], 1)

    out = width(draw)
    return Wire(wiring, body=nn.Sequential(conv(channels, out, 3), nn.ReLU(), conv(out, out))), channels + out


def twice(draw, channels):
    layer = conv(channels, channels, 3, groups=divisor(draw, channels, channels))
    return Wire(lambda m, x: m.layer(m.layer(x).relu()), layer=layer), channels


SIMPLE = (convolution, depthwise, transposed, in_three_dims, normed_weight, by_einsum, norm, activation, scale, shuffle,
          reorder, part, pixels, focus, maxout)  # fmt: skip
STRUCTURES = (residual, dense, branches, selective, squeeze_excite, gated, partial, scales, u_shape, twice, padded)
