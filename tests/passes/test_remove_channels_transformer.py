"""remove-channels in transformers beside attention: hidden units, experts and the residual stream go, exactly."""

import pytest
import torch
from models import inputs
from pruning import Wire, lengths, prune, shapes, weight
from torch import nn
from torch.nn import functional as F

TOKENS = inputs(2, 5, 8)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("affine", [True, False])
def test_norms_over_channels_count_what_is_left(norm, affine):
    model = nn.Sequential(nn.Linear(8, 16), norm(16, elementwise_affine=affine), nn.GELU(), nn.Linear(16, 3))

    after = prune(model, TOKENS)

    assert shapes(after) == {"0": (8, 8), "3": (3, 8)}
    assert "LayerNorm((8,)" in after.text() or "RMSNorm((8,)" in after.text() or "_norm(%_0, [8]" in after.text()


@pytest.mark.parametrize("norm", ["variance", "mean of squares", "norm"])
def test_norms_written_out(norm):
    def forward(m, x):
        x = m.stem(x)
        if norm == "variance":
            x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        elif norm == "mean of squares":
            x = x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        else:
            x = F.normalize(x, dim=-1)
        return m.head(x * m.gain)

    after = prune(Wire(forward, stem=nn.Linear(8, 16), gain=weight(16), head=nn.Linear(16, 3)), TOKENS)

    assert shapes(after) == {"stem": (8, 8), "head": (3, 8)}
    assert lengths(after)["gain"] == 8


def test_layer_norm_over_the_channels_of_an_image():
    def forward(m, x):
        x = F.layer_norm(m.stem(x).permute(0, 2, 3, 1), (8,), m.gain, m.offset, 1e-6).permute(0, 3, 1, 2)
        return m.head(x)

    model = Wire(forward, stem=nn.Conv2d(3, 8, 2, 2), gain=weight(8), offset=weight(8), head=nn.Conv2d(8, 2, 1))
    after = prune(model, inputs(2, 3, 8, 8))

    assert shapes(after) == {"stem": (4, 3, 2, 2), "head": (2, 4, 1, 1)}


@pytest.mark.parametrize("activation", ["glu", "swiglu", "fused swiglu"])
def test_gated_hidden_units(activation):
    def forward(m, x):
        if activation == "glu":
            return m.down(F.glu(m.up(x), -1))
        if activation == "fused swiglu":
            a, b = m.up(x).chunk(2, -1)
            return m.down(F.silu(a) * b)
        return m.down(F.silu(m.gate(x)) * m.value(x))

    layers = (
        {"gate": nn.Linear(8, 16), "value": nn.Linear(8, 16)} if activation == "swiglu" else {"up": nn.Linear(8, 32)}
    )
    after = prune(Wire(forward, **layers, down=nn.Linear(16, 8)), TOKENS)

    expected = {"gate": (8, 8), "value": (8, 8)} if activation == "swiglu" else {"up": (16, 8)}
    assert shapes(after) == {**expected, "down": (8, 8)}


def test_position_embeddings_and_class_token():
    def forward(m, x):
        x = m.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([m.token.expand(x.shape[0], -1, -1), x], 1) + m.position
        x = x + m.scale * m.mlp(m.norm(x)).relu()
        return m.head(x[:, 0])

    model = Wire(
        forward, patches=nn.Conv2d(3, 16, 4, 4), token=weight(1, 1, 16), position=weight(1, 5, 16), scale=weight(16),
        norm=nn.LayerNorm(16), mlp=nn.Linear(16, 16), head=nn.Linear(16, 3),
    )  # fmt: skip
    after = prune(model, inputs(2, 3, 8, 8))

    assert shapes(after) == {
        "token": (1, 1, 8), "position": (1, 5, 8), "patches": (8, 3, 4, 4), "mlp": (8, 8), "head": (3, 8),
    }  # fmt: skip
    assert lengths(after)["scale"] == 8


def test_embeddings_tied_to_the_output_lose_channels_and_no_words():
    def forward(m, x):
        x = m.words(x) + m.places.weight
        return F.linear(m.norm(x + m.down(m.up(x).relu())), m.words.weight)

    model = Wire(
        forward, words=nn.Embedding(11, 16), places=nn.Embedding(5, 16), up=nn.Linear(16, 32), down=nn.Linear(32, 16),
        norm=nn.LayerNorm(16),
    )  # fmt: skip
    after = prune(model, torch.randint(11, (2, 5)))

    assert shapes(after) == {"words": (11, 8), "places": (5, 8), "up": (16, 8), "down": (8, 16)}


def test_tied_modules_stay_tied():
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.body, self.head = nn.Embedding(11, 16), nn.Linear(16, 16), nn.Linear(16, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.body(self.embed(x)).relu())

    after = prune(Language(), torch.randint(11, (2, 5)))

    root = after.graph_module
    assert root.get_parameter("head.weight") is root.get_parameter("embed.weight")
    assert shapes(after) == {"embed": (11, 8), "body": (8, 8)}


def test_token_mixing_loses_hidden_units_and_keeps_tokens():
    def forward(m, x):
        x = m.stem(x)
        x = x + m.tokens_down(m.tokens_up(m.norm(x).transpose(1, 2)).relu()).transpose(1, 2)
        return m.head(x + m.down(m.up(x).relu()))

    model = Wire(
        forward, stem=nn.Linear(8, 12), norm=nn.LayerNorm(12), tokens_up=nn.Linear(5, 14), tokens_down=nn.Linear(14, 5),
        up=nn.Linear(12, 16), down=nn.Linear(16, 12), head=nn.Linear(12, 3),
    )  # fmt: skip
    after = prune(model, TOKENS)

    assert shapes(after) == {
        "stem": (6, 8), "tokens_up": (7, 5), "tokens_down": (5, 7), "up": (8, 6), "down": (6, 8), "head": (3, 6),
    }  # fmt: skip


@pytest.mark.parametrize("routing", ["soft", "top-k weights"])
def test_experts_lose_hidden_units(routing):
    def forward(m, x):
        gates = m.router(x).softmax(-1)
        if routing == "top-k weights":
            best, chosen = gates.topk(2, -1)
            gates = torch.zeros_like(gates).scatter(-1, chosen, best)
        found = torch.stack([expert(x) for expert in m.experts], -1)
        return m.head((found * gates[:, :, None]).sum(-1))

    def expert():
        return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 12))

    model = Wire(
        forward, router=nn.Linear(8, 4), experts=nn.ModuleList(expert() for _ in range(4)), head=nn.Linear(12, 3)
    )
    after = prune(model, TOKENS)

    assert shapes(after)["router"] == (4, 8)
    assert [shapes(after)[f"experts.{i}.{j}"] for i in range(4) for j in (0, 2)] == [(8, 8), (6, 8)] * 4


@pytest.mark.parametrize("routing", ["soft", "top-k"])
def test_experts_in_one_tensor(routing):
    def forward(m, x):
        gates = m.router(x).softmax(-1)
        if routing == "top-k":
            best, chosen = gates.topk(2, -1)
            gates = torch.zeros_like(gates).scatter(-1, chosen, best)
        hidden = torch.einsum("btc,ech->bteh", x, m.up).relu()
        return torch.einsum("bteh,ehc,bte->btc", hidden, m.down, gates)

    after = prune(Wire(forward, router=nn.Linear(8, 4), up=weight(4, 8, 16), down=weight(4, 16, 8)), TOKENS)

    experts = 2 if routing == "soft" else 4
    assert shapes(after) == {"up": (experts, 8, 8), "down": (experts, 8, 8), "router": (experts, 8)}
