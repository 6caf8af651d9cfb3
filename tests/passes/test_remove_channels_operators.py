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


def turned(times):
    return lambda m, x: torch.rot90(x.unflatten(1, (1, 4)), times, (1, 2)).flatten(1, 2)


def unpooled(pool, unpool, dims):
    def forward(m, x):
        places = x.transpose(1, 2).unflatten(-1, (4,) + (1,) * (dims - 1))
        return unpool(*pool(places, (2,) + (1,) * (dims - 1)), (2,) + (1,) * (dims - 1)).flatten(2).transpose(1, 2)

    return forward


def unpooled_by_places_of_another(m, x):
    values, places = F.max_pool1d(x.transpose(1, 2), 2, return_indices=True)
    return F.max_unpool1d(m.other(values.transpose(1, 2)).transpose(1, 2), places, 2).transpose(1, 2)


def filled_in_part(m, x):
    """All channels of the first two tokens become a constant."""
    x = x * 1
    x[:, :2] = 0.5
    return x


def scaled_by(total):
    return lambda m, x: x * total(x)


PASSED_ON = {
    "fill of some places": filled_in_part,
    "fill with a tensor": lambda m, x: x + torch.ops.aten.fill.Tensor(x, m.one[0]),
    "max_unpool1d": unpooled(functools.partial(F.max_pool1d, return_indices=True), F.max_unpool1d, 1),
    "max_unpool2d": unpooled(functools.partial(F.max_pool2d, return_indices=True), F.max_unpool2d, 2),
    "max_unpool3d": unpooled(functools.partial(F.max_pool3d, return_indices=True), F.max_unpool3d, 3),
    "max_unpool of other values": unpooled_by_places_of_another,
    "rot90": turned(1),
    "rot90 by a half turn": turned(2),
    "logcumsumexp": lambda m, x: x.logcumsumexp(1),
    "cummax": lambda m, x: x.cummax(1)[0],
    "cummin": lambda m, x: x.cummin(1)[0],
    "renorm of tokens": lambda m, x: torch.renorm(x, 2, 1, 0.1),
    "renorm of channels": lambda m, x: torch.renorm(x, 2, -1, 0.1),
    "nansum": scaled_by(lambda x: x.nansum(-1, keepdim=True)),
    "nanmean": scaled_by(lambda x: x.nanmean(-1, keepdim=True)),
    "nanmean of tokens": scaled_by(lambda x: x.nanmean(1, keepdim=True)),
    "count_nonzero": scaled_by(lambda x: x.relu().count_nonzero(-1)[..., None]),
    "count_nonzero of tokens and channels": scaled_by(lambda x: x.relu().count_nonzero((1, 2))[:, None, None]),
    "linalg.norm": scaled_by(lambda x: torch.linalg.norm(x, dim=-1, keepdim=True)),
    "linalg.norm of negative order": scaled_by(lambda x: torch.linalg.norm(x, -1, dim=-1, keepdim=True)),
    "linalg.norm by name": scaled_by(lambda x: torch.linalg.norm(x, "nuc", dim=(1, 2), keepdim=True)),
    "linalg.matrix_norm by name": scaled_by(lambda x: torch.linalg.matrix_norm(x, keepdim=True)),
    "linalg.vecdot": lambda m, x: x * torch.linalg.vecdot(x, m.other(x))[..., None],
    "linalg.vecdot over tokens": lambda m, x: x * torch.linalg.vecdot(x, x, dim=1)[:, None],
    "inner": lambda m, x: torch.inner(x.flatten(0, 1), m.table).unflatten(0, x.shape[:2]) @ m.table,
    "inner with a number": lambda m, x: torch.inner(m.one[0], x),
    "tensordot": lambda m, x: torch.tensordot(torch.tensordot(x, m.table, ([2], [1])), m.table, 1),
    "tensordot with one row for all": lambda m, x: torch.tensordot(x, m.row, ([2], [0])),
    "tensordot of two dims": lambda m, x: x * torch.tensordot(x, m.plane, ([2, 1], [1, 0]))[:, None, None],
}  # fmt: skip


@pytest.mark.parametrize("case", PASSED_ON)
def test_channels_pass(case):
    model = between(
        PASSED_ON[case], one=weight(1), row=weight(1, 8), table=weight(3, 8), plane=weight(4, 8), other=nn.Linear(8, 8)
    )

    after = prune(model, inputs(2, 4, 6))

    assert (shapes(after)["stem"], shapes(after)["head"]) == ((4, 6), (2, 4))


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x.logcumsumexp(-1),
        lambda m, x: x.cummax(-1)[0],
        lambda m, x: torch.rot90(torch.rot90(x, 1, (1, 2)), 1, (1, 2)),
        lambda m, x: torch.rot90(x, 1, (1, 2)).transpose(1, 2),
    ],
)
def test_channels_stay_where_their_order_counts(function):
    after = prune(between(function), TOKENS)

    assert shapes(after) == {"stem": (8, 6), "head": (2, 8)}


@pytest.mark.parametrize("norm", [torch.linalg.norm, torch.linalg.matrix_norm])
@pytest.mark.parametrize(("order", "left"), [(2, 4), (-2, 8), (1, 4), (-1, 8)])
def test_a_matrix_norm_needs_all_channels_only_where_it_looks_for_the_smallest(norm, order, left):
    model = between(scaled_by(lambda x: norm(x, order, dim=(1, 2), keepdim=True)))

    after = prune(model, TOKENS, batch_dim=None)

    assert shapes(after) == {"stem": (left, 6), "head": (2, left)}


def test_the_other_operand_of_a_contraction_loses_what_meets_and_keeps_its_own():
    model = between(lambda m, x: torch.tensordot(x, m.table, ([-1], [0])), table=weight(8, 6))
    model.head = nn.Linear(6, 2)

    after = prune(model, TOKENS)

    assert shapes(after) == {"stem": (4, 6), "table": (4, 3), "head": (2, 3)}


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
