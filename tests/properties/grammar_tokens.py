"""Productions over tokens (N, tokens, channels): each draws a module, and says how many channels it gives."""

import torch
from grammar_images import divisor, pick, width
from hypothesis import strategies as st
from pruning import Wire, weight
from torch import nn
from torch.nn import functional as F


def heads_of(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge(x):
    return x.transpose(1, 2).flatten(2)


def by_matmul(query, key, value, bias=0):
    return (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5 + bias).softmax(-1) @ value


def by_einsum(query, key, value, bias=0):
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * query.shape[-1] ** -0.5 + bias
    return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), value)


def by_bmm(query, key, value, bias=0):
    query, key, value = (x.flatten(0, 1) for x in (query, key, value))
    return by_matmul(query, key, value).unflatten(0, (-1, 2))


def scaled(query, key, value, bias=None):
    return F.scaled_dot_product_attention(query, key, value, bias)


def linear_attention(query, key, value, bias=0):
    return query.softmax(-1) @ (key.softmax(-2).transpose(-2, -1) @ value)


def over_channels(query, key, value, bias=0):
    query, key, value = (x.transpose(-2, -1) for x in (query, key, value))
    scores = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).transpose(-2, -1)
    return (scores.softmax(-1) @ value).transpose(-2, -1)


# --- layers ----------------------------------------------------------------------------------------------------------


def linear(draw, tokens, channels):
    out = width(draw)
    return nn.Linear(channels, out, bias=draw(st.booleans())), out


def norm(draw, tokens, channels):
    def written_out(m, x):
        return m.gain * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()

    def standardised(m, x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (x.var(-1, keepdim=True, correction=0) + 1e-6).sqrt() * m.gain

    def unit_length(m, x):
        return F.normalize(x, dim=-1) * m.gain

    kind = pick(draw, "layer", "rms", written_out, standardised, unit_length)
    if kind == "layer":
        return nn.LayerNorm(channels, elementwise_affine=draw(st.booleans())), channels
    return nn.RMSNorm(channels) if kind == "rms" else Wire(kind, gain=weight(channels)), channels


def activation(draw, tokens, channels):
    return pick(draw, nn.ReLU(), nn.GELU(), nn.SiLU(), nn.Dropout(0.1)), channels


def one_dim_convolution(draw, tokens, channels):
    groups = divisor(draw, channels)
    out = groups * draw(st.integers(1, 3))
    layer = nn.Conv1d(channels, out, 3, padding="same", groups=groups)
    return Wire(lambda m, x: m.conv(x.transpose(1, 2)).transpose(1, 2), conv=layer), out


def recurrent(draw, tokens, channels):
    kind, hidden, both = pick(draw, nn.LSTM, nn.GRU), pick(draw, 2, 3, 4), draw(st.booleans())
    cells = kind(channels, hidden, draw(st.integers(1, 2)), batch_first=True, bidirectional=both)
    return Wire(lambda m, x: m.cells(x)[0], cells=cells), hidden * (2 if both else 1)


# --- residual parts: as many channels as before ----------------------------------------------------------------------


def attention(draw, tokens, channels):
    heads, dim = pick(draw, 2, 1, 3), draw(st.integers(1, 4))
    mixing = pick(draw, scaled, scaled, by_matmul, by_einsum, linear_attention, over_channels)
    mixing = by_bmm if heads == 2 and draw(st.booleans()) else mixing
    fused, biased = pick(draw, "", "", "three first", "chunks", "heads first"), draw(st.booleans())
    inner = heads * dim

    def wiring(m, x):
        if fused == "three first":
            query, key, value = m.qkv(x).unflatten(-1, (3, heads, dim)).permute(2, 0, 3, 1, 4).unbind(0)
        elif fused == "heads first":
            query, key, value = m.qkv(x).unflatten(-1, (heads, 3 * dim)).transpose(1, 2).chunk(3, -1)
        elif fused == "chunks":
            query, key, value = (heads_of(part, heads) for part in m.qkv(x).chunk(3, -1))
        else:
            query, key, value = (heads_of(layer(x), heads) for layer in (m.q, m.k, m.v))
        return m.out(merge(mixing(query, key, value, m.bias) if biased else mixing(query, key, value)))

    layers = {"qkv": nn.Linear(channels, 3 * inner)} if fused else {n: nn.Linear(channels, inner) for n in "qkv"}
    return Wire(wiring, **layers, out=nn.Linear(inner, channels), bias=weight(heads, tokens, tokens))


def grouped_queries(draw, tokens, channels):
    groups, each, dim = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    way, heads = pick(draw, "enable", "interleave", "expand"), groups * each

    def wiring(m, x):
        query, key, value = heads_of(m.q(x), heads), heads_of(m.k(x), groups), heads_of(m.v(x), groups)
        if way == "enable":
            return m.out(merge(F.scaled_dot_product_attention(query, key, value, enable_gqa=True)))
        if way == "interleave":
            key, value = (part.repeat_interleave(each, 1) for part in (key, value))
        else:
            key, value = (part[:, :, None].expand(-1, -1, each, -1, -1).flatten(1, 2) for part in (key, value))
        return m.out(merge(scaled(query, key, value)))

    layers = {"q": heads * dim, "k": groups * dim, "v": groups * dim}
    made = {name: nn.Linear(channels, width) for name, width in layers.items()}
    return Wire(wiring, **made, out=nn.Linear(heads * dim, channels))


def rotary(draw, tokens, channels):
    heads, pairs, halves = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.booleans())

    def turned(m, x):
        if halves:
            first, second = x.chunk(2, -1)
            return x * m.cos + torch.cat([-second, first], -1) * m.sin
        return x * m.cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * m.sin

    def wiring(m, x):
        query, key, value = (heads_of(layer(x), heads) for layer in (m.q, m.k, m.v))
        return m.out(merge(scaled(turned(m, query), turned(m, key), value)))

    angle = torch.outer(torch.arange(tokens), 2.0 ** -torch.arange(pairs)).double()
    angle = torch.cat([angle, angle], -1) if halves else angle.repeat_interleave(2, -1)
    made = {name: nn.Linear(channels, 2 * heads * pairs) for name in "qkv"}
    out = nn.Linear(2 * heads * pairs, channels)
    return Wire(wiring, **made, out=out, cos=angle.cos(), sin=angle.sin())


def cross(draw, tokens, channels):
    heads, dim = draw(st.integers(1, 3)), draw(st.integers(1, 3))

    def wiring(m, x):
        query = heads_of(m.q(m.queries.expand(x.shape[0], -1, -1)), heads)
        found = by_matmul(query, heads_of(m.k(x), heads), heads_of(m.v(x), heads))
        return m.out(merge(found)).mean(1, keepdim=True)

    made = {name: nn.Linear(channels, heads * dim) for name in "qkv"}
    return Wire(wiring, **made, queries=weight(1, 3, channels), out=nn.Linear(heads * dim, channels))


def talking_heads(draw, tokens, channels):
    def wiring(m, x):
        query, key, value = (heads_of(layer(x), 3) for layer in (m.q, m.k, m.v))
        scores = m.mix((query @ key.transpose(-2, -1)).permute(0, 2, 3, 1)).softmax(2).permute(0, 3, 1, 2)
        return m.out(merge(scores @ value * m.temperature))

    made = {name: nn.Linear(channels, 6) for name in "qkv"}
    return Wire(wiring, **made, mix=nn.Linear(3, 3), temperature=weight(3, 1, 1), out=nn.Linear(6, channels))


def library_attention(draw, tokens, channels):
    heads = divisor(draw, channels)
    layer = nn.MultiheadAttention(channels, heads, batch_first=True)
    return Wire(lambda m, x: m.layer(x, x, x, need_weights=False)[0], layer=layer)


def hidden_units(draw, tokens, channels):
    hidden, way = width(draw), pick(draw, "plain", "gated", "fused")

    def wiring(m, x):
        if way == "plain":
            return m.down(F.gelu(m.up(x)))
        if way == "gated":
            return m.down(F.silu(m.gate(x)) * m.up(x))
        a, b = m.both(x).chunk(2, -1)
        return m.down(a.sigmoid() * b)

    widths = {"plain": {"up": 1}, "gated": {"gate": 1, "up": 1}, "fused": {"both": 2}}[way]
    made = {name: nn.Linear(channels, times * hidden) for name, times in widths.items()}
    return Wire(wiring, **made, down=nn.Linear(hidden, channels))


def token_mixing(draw, tokens, channels):
    hidden = width(draw)
    layers = {"up": nn.Linear(tokens, hidden), "down": nn.Linear(hidden, tokens)}
    return Wire(lambda m, x: m.down(m.up(x.transpose(1, 2)).relu()).transpose(1, 2), **layers)


def experts(draw, tokens, channels):
    count, hidden, together = draw(st.integers(2, 3)), width(draw), draw(st.booleans())

    def in_one_tensor(m, x):
        inner = torch.einsum("btc,ech->bteh", x, m.up).relu()
        return torch.einsum("bteh,ehc,bte->btc", inner, m.down, m.router(x).softmax(-1))

    def one_by_one(m, x):
        found = torch.stack([expert(x) for expert in m.experts], -1)
        return (found * m.router(x).softmax(-1)[:, :, None]).sum(-1)

    router = nn.Linear(channels, count)
    if together:
        up, down = weight(count, channels, hidden), weight(count, hidden, channels)
        return Wire(in_one_tensor, up=up, down=down, router=router)
    layers = [nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels)) for _ in range(count)]
    return Wire(one_by_one, router=router, experts=nn.ModuleList(layers))


def beside(body):
    """The production of a residual part, with the norm and the shortcut around it."""

    def production(draw, tokens, channels):
        part, (before, _) = body(draw, tokens, channels), norm(draw, tokens, channels)
        if draw(st.booleans()):
            wiring, layers = scaled_part, {"gain": weight(channels)}
        else:
            wiring, layers = normed_sum, {}
        return Wire(wiring, part=part, before=before, **layers), channels

    production.__name__ = body.__name__
    return production


def scaled_part(m, x):
    return x + m.gain * m.part(m.before(x))


def normed_sum(m, x):
    return m.before(x + m.part(x))


LAYERS = (linear, norm, activation, one_dim_convolution, recurrent)
PARTS = (
    attention,
    grouped_queries,
    rotary,
    cross,
    talking_heads,
    library_attention,
    hidden_units,
    token_mixing,
    experts,
)
BODIES = tuple(map(beside, PARTS))
