"""remove-channels through single operators: each passes on what it can, and keeps what it needs."""

import functools

import pytest
import torch
from models import inputs
from pruning import Wire, prune, shapes, weight
from torch import nn
from torch.nn import functional as F

IMAGE, TOKENS = inputs(2, 3, 8, 8), inputs(2, 5, 6)


def between(function, **layers):
    """A function of 8 channels of each token between two linear layers."""
    return Wire(lambda m, x: m.head(function(m, m.stem(x))), stem=nn.Linear(6, 8), **layers, head=nn.Linear(8, 2))


def test_a_layer_called_twice_is_rewritten_once():
    model = Wire(
        lambda m, x: m.head(m.norm(m.depth(m.norm(m.depth(m.stem(x))).relu()))),
        stem=nn.Conv2d(3, 8, 1), depth=nn.Conv2d(8, 8, 3, groups=8), norm=nn.GroupNorm(8, 8), head=nn.Conv2d(8, 2, 1),
    )  # fmt: skip

    after = prune(model, IMAGE)

    assert shapes(after)["depth"] == (4, 1, 3, 3)
    assert after.graph_module.depth.groups == after.graph_module.norm.num_groups == 4


@pytest.mark.parametrize("swap", [torch.transpose, torch.swapaxes, torch.swapdims])
@pytest.mark.parametrize("dims", [(1, 2), (-2, -3)])
def test_any_two_dims_may_change_places(swap, dims):
    def by_head(m, x):
        heads = swap(x.view(x.shape[0], 5, 4, 2), *dims).softmax(2)
        return swap(heads, *dims).reshape(x.shape)

    assert shapes(prune(between(by_head), TOKENS)) == {"stem": (2, 6), "head": (2, 2)}


def test_a_kernel_of_size_one_leaves_places_alone():
    """Spatial gating (arXiv:2105.08050): a convolution over tokens, whose places are channels."""

    def gate(m, x):
        first, second = m.up(x).chunk(2, -1)
        return m.down(first * m.mix(second))

    model = between(gate, up=nn.Linear(8, 16), mix=nn.Conv1d(5, 5, 1), down=nn.Linear(8, 8))

    after = prune(model, TOKENS)

    assert shapes(after) == {"stem": (4, 6), "up": (8, 4), "mix": (5, 5, 1), "down": (4, 4), "head": (2, 4)}


def test_a_kernel_computed_for_each_sample():
    """Dynamic convolution (arXiv:1912.03458): as many groups as samples."""

    def forward(m, x):
        x = m.stem(x)
        n, c, h, w = x.shape
        kernels = (m.route(x.mean((2, 3))).softmax(-1) @ m.bank.flatten(1)).view(n * 6, c, 3, 3)
        return m.head(F.conv2d(x.reshape(1, n * c, h, w), kernels, padding=1, groups=n).view(n, 6, h, w))

    model = Wire(forward, stem=nn.Conv2d(3, 8, 1), route=nn.Linear(8, 4), bank=weight(4, 6, 8, 3, 3),
                 head=nn.Conv2d(6, 2, 1))  # fmt: skip

    after = prune(model, IMAGE)

    assert shapes(after) == {"stem": (4, 3, 1, 1), "route": (2, 4), "bank": (2, 3, 4, 3, 3), "head": (2, 3, 1, 1)}


@pytest.mark.parametrize("extreme", [torch.max, torch.min])
def test_an_extreme_over_channels_of_which_nobody_reads_the_place(extreme):
    after = prune(between(lambda m, x: x * extreme(x, -1, keepdim=True)[0]), TOKENS)

    assert shapes(after) == {"stem": (4, 6), "head": (2, 4)}


def test_the_place_of_an_extreme_is_a_number_that_keeps_channels():
    model = Wire(
        lambda m, x: (m.head(m.stem(x)), torch.max(m.other(x), -1)), stem=nn.Linear(6, 8), other=nn.Linear(6, 8),
        head=nn.Linear(8, 2),
    )  # fmt: skip

    after = prune(model, TOKENS)

    assert shapes(after) == {"stem": (4, 6), "other": (8, 6), "head": (2, 4)}


def index_put(m, x):
    found = x.new_zeros(x.shape[0], 7, 8)
    found[:, m.places] = x
    return found


def index_add(m, x):
    return x.new_zeros(x.shape[0], 7, 8).index_add(1, m.places, x)


def scatter_add(m, x):
    return x.new_zeros(x.shape[0], 7, 8).scatter_add(1, m.places[None, :, None].expand_as(x), x)


@pytest.mark.parametrize("write", [index_put, index_add, scatter_add])
def test_tokens_written_by_number_pass_on_channels(write):
    after = prune(between(write, places=torch.tensor([6, 1, 2, 0, 4])), TOKENS)

    assert shapes(after) == {"stem": (4, 6), "head": (2, 4)}


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_embeddings(mode):
    model = Wire(lambda m, x: m.head(m.words(x)), words=nn.EmbeddingBag(9, 8, mode=mode), head=nn.Linear(8, 2))

    after = prune(model, torch.tensor([[0, 3, 1], [2, 2, 7]]))

    assert shapes(after) == {"words": (9, 4), "head": (2, 4)}


def test_fourier_transforms_keep_what_they_transform():
    along = prune(between(lambda m, x: torch.fft.fft(x, dim=1).real), TOKENS)
    across = prune(between(lambda m, x: torch.fft.fft(m.skip(x), dim=-1).real, skip=nn.Linear(8, 8)), TOKENS)

    assert shapes(along) == {"stem": (4, 6), "head": (2, 4)}
    assert shapes(across) == {"stem": (4, 6), "skip": (8, 4), "head": (2, 8)}


@pytest.mark.parametrize("made", [torch.zeros, functools.partial(torch.full, fill_value=0.5)])
def test_scores_added_to_a_constant_of_all_heads(made):
    def attend(m, x):
        n, t, _ = x.shape
        query, key, value = (
            layer(x).view(n, t, 4, 2).transpose(1, 2).reshape(n * 4, t, 2) for layer in (m.q, m.k, m.v)
        )
        scores = torch.baddbmm(made((n * 4, t, t), dtype=x.dtype), query, key.transpose(1, 2))
        return torch.bmm(scores.softmax(-1), value).view(n, 4, t, 2).transpose(1, 2).flatten(2)

    after = prune(between(attend, **{name: nn.Linear(8, 8) for name in "qkv"}), TOKENS)

    assert shapes(after) == {"stem": (4, 6), "q": (2, 4), "k": (2, 4), "v": (2, 4), "head": (2, 2)}


def test_reading_the_size_of_one_dim_keeps_only_that_dim():
    """Normalizing windows reads their number from a value in the middle; heads and their channels may go."""

    def forward(m, x):
        heads = m.stem(x.reshape(-1, 6)).reshape(-1, 4, 4)
        return m.head(F.normalize(heads, dim=-1).reshape(-1, 16)).reshape(-1, 5, 2)

    after = prune(Wire(forward, stem=nn.Linear(6, 16), head=nn.Linear(16, 2)), TOKENS)

    read = [node.args[0].op for node in after.nodes if "sym_size" in str(node.target)]
    assert set(read) - {"placeholder"}
    assert shapes(after) == {"stem": (4, 6), "head": (2, 4)}
