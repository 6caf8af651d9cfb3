"""remove-channels in attention: heads and head dims go, exactly, however attention is written."""

import math

import pytest
import torch
from models import inputs
from pruning import Wire, prune, shapes, weight
from torch import nn
from torch.nn import functional as F

TOKENS = inputs(2, 5, 8)


def merge(x):
    return x.transpose(1, 2).flatten(2)


def scaled(query, key, value, **options):
    return F.scaled_dot_product_attention(query, key, value, **options)


def by_matmul(query, key, value):
    return (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(-1) @ value


def by_einsum(query, key, value):
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) / math.sqrt(query.shape[-1])
    return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), value)


def by_bmm(query, key, value):
    batch, heads, tokens, dim = query.shape
    query, key, value = (x.reshape(batch * heads, -1, dim) for x in (query, key, value))
    scores = torch.bmm(query * dim**-0.5, key.transpose(1, 2))
    return torch.bmm(scores.softmax(-1), value).view(batch, heads, tokens, dim)


ATTENTION = [scaled, by_matmul, by_einsum, by_bmm]


def heads_of(x, heads, dim):
    return x.view(*x.shape[:2], heads, dim).transpose(1, 2)


@pytest.mark.parametrize("attention", ATTENTION)
def test_separate_projections(attention):
    def forward(m, x):
        query, key, value = (heads_of(layer(x), 4, 6) for layer in (m.q, m.k, m.v))
        return m.head(x + m.out(merge(attention(query, key, value))))

    linears = {name: nn.Linear(8, 24) for name in "qkv"}
    after = prune(Wire(forward, **linears, out=nn.Linear(24, 8), head=nn.Linear(8, 3)), TOKENS)

    assert shapes(after) == {"q": (6, 8), "k": (6, 8), "v": (6, 8), "out": (8, 6), "head": (3, 8)}


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("layout", ["three heads dims", "chunks", "heads three dims", "slices"])
def test_fused_projection(attention, layout):
    def forward(m, x):
        x = m.stem(x)
        both = m.qkv(x)
        if layout == "three heads dims":
            query, key, value = both.reshape(*x.shape[:2], 3, 4, 6).permute(2, 0, 3, 1, 4).unbind(0)
        elif layout == "heads three dims":
            query, key, value = both.view(*x.shape[:2], 4, 18).transpose(1, 2).chunk(3, -1)
        elif layout == "chunks":
            query, key, value = (heads_of(part, 4, 6) for part in both.chunk(3, -1))
        else:
            query, key, value = (heads_of(both[..., at : at + 24], 4, 6) for at in (0, 24, 48))
        return m.head(x + m.out(merge(attention(query, key, value))))

    model = Wire(forward, stem=nn.Linear(8, 12), qkv=nn.Linear(12, 72), out=nn.Linear(24, 12), head=nn.Linear(12, 3))
    after = prune(model, TOKENS)

    assert shapes(after) == {"stem": (6, 8), "qkv": (18, 6), "out": (6, 6), "head": (3, 6)}


def test_pytorchs_own_layer():
    model = nn.Sequential(nn.Linear(8, 16), nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), nn.Linear(16, 3))

    after = prune(model, TOKENS)

    assert shapes(after) == {
        "0": (8, 8), "1.self_attn.in_proj_weight": (12, 8), "1.self_attn.out_proj": (8, 4),
        "1.linear1": (16, 8), "1.linear2": (8, 16), "2": (3, 8),
    }  # fmt: skip


def test_attention_keeps_the_scale_of_the_head_dim_before():
    def forward(m, x):
        return m.out(merge(F.scaled_dot_product_attention(*(heads_of(layer(x), 4, 6) for layer in (m.q, m.k, m.v)))))

    linears = {name: nn.Linear(8, 24) for name in "qkv"}
    after = prune(Wire(forward, **linears, out=nn.Linear(24, 8)), TOKENS)

    (call,) = after.graph.find_nodes(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default)
    assert call.kwargs["scale"] == pytest.approx(6**-0.5)


@pytest.mark.parametrize("how", ["enable_gqa", "repeat_interleave", "expand"])
@pytest.mark.parametrize("groups", [1, 2, 8], ids=["multi-query", "grouped-query", "one to one"])
def test_grouped_queries(how, groups):
    def forward(m, x):
        query, key, value = heads_of(m.q(x), 8, 6), heads_of(m.k(x), groups, 6), heads_of(m.v(x), groups, 6)
        if how == "enable_gqa":
            mixed = scaled(query, key, value, enable_gqa=True)
        elif how == "repeat_interleave":
            mixed = scaled(query, *(x.repeat_interleave(8 // groups, 1) for x in (key, value)))
        else:
            batch, _, tokens, dim = key.shape
            spread = (batch, groups, 8 // groups, tokens, dim)
            mixed = scaled(query, *(x[:, :, None].expand(spread).reshape(batch, 8, tokens, dim) for x in (key, value)))
        return m.out(merge(mixed))

    model = Wire(
        forward, q=nn.Linear(8, 48), k=nn.Linear(8, groups * 6), v=nn.Linear(8, groups * 6), out=nn.Linear(48, 8)
    )
    after = prune(model, TOKENS)

    left, queries = max(groups // 2, 1), max(8 // groups // 2, 1)
    assert shapes(after)["k"] == shapes(after)["v"] == (left * 3, 8)
    assert shapes(after)["q"][0] == shapes(after)["out"][1] == left * 3 * queries


def rotate(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def interleave(x, cos, sin):
    pairs = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * cos + pairs * sin


@pytest.mark.parametrize("turn", [rotate, interleave])
def test_rotary_embeddings_lose_pairs_of_head_dims(turn):
    def forward(m, x):
        query, key, value = (heads_of(layer(x), 4, 8) for layer in (m.q, m.k, m.v))
        angle = torch.outer(torch.arange(x.shape[1], dtype=x.dtype), m.frequency)
        angle = torch.cat([angle, angle], -1) if turn is rotate else angle.repeat_interleave(2, -1)
        cos, sin = angle.cos(), angle.sin()
        return m.out(merge(scaled(turn(query, cos, sin), turn(key, cos, sin), value)))

    linears = {name: nn.Linear(8, 32) for name in "qkv"}
    frequency = 10 ** -torch.linspace(0, 1, 4, dtype=torch.float64)
    after = prune(Wire(forward, **linears, out=nn.Linear(32, 8), frequency=frequency), TOKENS)

    assert shapes(after) == {"q": (8, 8), "k": (8, 8), "v": (8, 8), "out": (8, 8)}


def test_cross_attention():
    def forward(m, x, memory):
        query, key, value = heads_of(m.q(x), 4, 6), heads_of(m.k(memory), 4, 6), heads_of(m.v(memory), 4, 6)
        return m.out(merge(scaled(query, key, value)))

    model = Wire(forward, q=nn.Linear(8, 24), k=nn.Linear(10, 24), v=nn.Linear(10, 24), out=nn.Linear(24, 8))
    after = prune(model, TOKENS, inputs(2, 7, 10, seed=2))

    assert shapes(after) == {"q": (6, 8), "k": (6, 10), "v": (6, 10), "out": (8, 6)}


def windows(x, size):
    batch, height, width, channels = x.shape
    x = x.view(batch, height // size, size, width // size, size, channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, size * size, channels)


def unwindows(x, size, height, width):
    channels = x.shape[-1]
    x = x.view(-1, height // size, width // size, size, size, channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, height, width, channels)


@pytest.mark.parametrize("shift", [0, 2])
def test_window_attention_with_a_table_of_biases(shift):
    def forward(m, x):
        x = m.stem(x.permute(0, 2, 3, 1))
        shifted = torch.roll(x, (-shift, -shift), (1, 2))
        rows = windows(shifted, 4)
        query, key, value = m.qkv(rows).view(-1, 16, 3, 4, 6).permute(2, 0, 3, 1, 4).unbind(0)
        scores = query * 6**-0.5 @ key.transpose(-2, -1)
        scores = scores + m.table[m.index.flatten()].view(16, 16, 4).permute(2, 0, 1)[None]
        if shift:
            scores = (scores.view(-1, 4, 4, 16, 16) + m.mask[:, None]).view(-1, 4, 16, 16)
        mixed = m.out((scores.softmax(-1) @ value).transpose(1, 2).reshape(-1, 16, 24))
        return m.head(x + torch.roll(unwindows(mixed, 4, 8, 8), (shift, shift), (1, 2)))

    place = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    index = ((place[:, None] - place[None] + 3) * torch.tensor([7, 1])).sum(-1)
    mask = torch.zeros(4, 16, 16, dtype=torch.float64)
    mask[1:, :8, 8:] = -100
    model = Wire(
        forward, stem=nn.Linear(3, 12), qkv=nn.Linear(12, 72), table=weight(49, 4), out=nn.Linear(24, 12),
        head=nn.Linear(12, 2), index=index, mask=mask,
    )  # fmt: skip
    after = prune(model, inputs(2, 3, 8, 8))

    assert shapes(after) == {"table": (49, 2), "stem": (6, 3), "qkv": (18, 6), "out": (6, 6), "head": (2, 6)}


def test_biases_of_each_head():
    def forward(m, x):
        query, key, value = (heads_of(layer(x), 4, 6) for layer in (m.q, m.k, m.v))
        scores = query @ key.transpose(-2, -1) * m.temperature + m.bias
        return m.out(merge(scores.softmax(-1) @ value))

    linears = {name: nn.Linear(8, 24) for name in "qkv"}
    model = Wire(forward, **linears, temperature=weight(4, 1, 1), bias=weight(4, 5, 5), out=nn.Linear(24, 8))
    after = prune(model, TOKENS)

    assert shapes(after) == {
        "temperature": (2, 1, 1), "bias": (2, 5, 5), "q": (6, 8), "k": (6, 8), "v": (6, 8), "out": (8, 6),
    }  # fmt: skip


def test_heads_that_mix_with_each_other():
    def forward(m, x):
        query, key, value = (heads_of(layer(x), 4, 6) for layer in (m.q, m.k, m.v))
        scores = m.before((query @ key.transpose(-2, -1)).permute(0, 2, 3, 1)).softmax(2)
        return m.out(merge(m.after(scores).permute(0, 3, 1, 2) @ value))

    linears = {name: nn.Linear(8, 24) for name in "qkv"}
    model = Wire(forward, **linears, before=nn.Linear(4, 4), after=nn.Linear(4, 4), out=nn.Linear(24, 8))
    after = prune(model, TOKENS)

    assert shapes(after)["before"] == shapes(after)["after"] == (2, 2)
    assert shapes(after)["q"] == shapes(after)["k"] == shapes(after)["v"] == (6, 8)


def test_attention_over_channels():
    def forward(m, x):
        query, key, value = m.qkv(x).view(*x.shape[:2], 3, 4, 6).permute(2, 0, 3, 4, 1).unbind(0)
        scores = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).transpose(-2, -1)
        return m.out((scores.softmax(-1) @ value).flatten(1, 2).transpose(1, 2))

    after = prune(Wire(forward, qkv=nn.Linear(8, 72), out=nn.Linear(24, 8)), TOKENS)

    assert shapes(after) == {"qkv": (18, 8), "out": (8, 6)}


def test_linear_attention():
    def forward(m, x):
        query, key, value = (heads_of(layer(x), 4, 6) for layer in (m.q, m.k, m.v))
        context = key.softmax(-2).transpose(-2, -1) @ value
        return m.out(merge(query.softmax(-1) @ context))

    linears = {name: nn.Linear(8, 24) for name in "qkv"}
    after = prune(Wire(forward, **linears, out=nn.Linear(24, 8)), TOKENS)

    assert shapes(after) == {"q": (6, 8), "k": (6, 8), "v": (6, 8), "out": (8, 6)}


def test_products_of_three_factors_lose_some_of_each():
    def forward(m, x):
        query, key = (layer(x).view(*x.shape[:2], 2, 4, 6) for layer in (m.q, m.k))
        return m.head(torch.einsum("btxyz,bsxyz->bts", query, key))

    after = prune(Wire(forward, q=nn.Linear(8, 48), k=nn.Linear(8, 48), head=nn.Linear(5, 3)), TOKENS)

    assert "[%sym_size, 5, 1, 2, 3]" in after.text()
    assert shapes(after) == {"q": (6, 8), "k": (6, 8), "head": (3, 5)}
