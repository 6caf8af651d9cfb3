"""The removal oracle on its own: masks made by hand, and what it must compute worked out by hand too."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from models import inputs, settled
from pruning import Wire, weight
from torch import nn
from torch.nn import functional as F

from fxcompress import trace
from fxcompress.errors import VerificationError
from fxcompress.ir.ops import set_state
from fxcompress.verification.oracle import KeptFactor, Oracle, check_removal

KEEP = np.array([True, False, True, True, False, True])
ALL = (KeptFactor(None),)
SOME = (KeptFactor(6, KEEP),)


def traced(model, *xs):
    return trace(settled(model), tuple(xs))


def masked(program, kept, *xs):
    with torch.no_grad():
        (found,) = Oracle(program, kept).run(*xs)
    return found


def test_runs_without_the_passes():
    code = (
        "import sys, fxcompress.verification.oracle\n"
        "assert not [name for name in sys.modules if name.startswith('fxcompress.passes')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_computes_the_program_itself_where_all_is_kept():
    x = inputs(3, 4)
    program = traced(nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)), x)

    assert torch.equal(masked(program, {}, x), program(x))


def test_removed_elements_are_zero_after_each_node():
    x = inputs(3, 4)
    program = traced(Wire(lambda m, x: m.b(m.a(x).cos()), a=nn.Linear(4, 6), b=nn.Linear(6, 2)), x)
    a, b = (program.graph_module.get_submodule(name) for name in "ab")

    found = masked(program, {"a": (ALL, SOME), "cos": (ALL, SOME)}, x)

    hidden = F.linear(x, a.weight[KEEP], a.bias[KEEP]).cos()
    torch.testing.assert_close(found, F.linear(hidden, b.weight[:, KEEP], b.bias), rtol=1e-12, atol=0)


def test_a_dim_of_several_factors_is_masked_by_their_product():
    x = inputs(2, 6, 4)
    program = traced(Wire(lambda m, x: x.neg().flatten(1)), x)
    kept = ((KeptFactor(None),), (KeptFactor(6, KEEP), KeptFactor(4)))

    found = masked(program, {"flatten": kept}, x)

    assert torch.equal(found.view(2, 6, 4), torch.where(torch.from_numpy(KEEP)[:, None], -x, 0))


def test_a_factor_of_unknown_size_takes_what_the_others_leave():
    x = inputs(5, 6, 4)
    program = traced(Wire(lambda m, x: x.neg().flatten(0, 1)), x)
    kept = ((KeptFactor(None), KeptFactor(6, KEEP)), (KeptFactor(4),))

    expected = torch.where(torch.from_numpy(KEEP)[:, None], -x[0], 0)
    assert torch.equal(masked(program, {"flatten": kept}, x)[:6], expected)


def test_several_results_are_masked_one_by_one():
    x = inputs(3, 6)
    program = traced(Wire(lambda m, x: torch.cat(x.neg().split([2, 4], 1), 1)), x)
    pieces = [[ALL, (KeptFactor(2, KEEP[:2]),)], [ALL, (KeptFactor(4, KEEP[2:]),)]]

    (split,) = [node.name for node in program.nodes if isinstance(node.meta.get("val"), (list, tuple))]

    found = masked(program, {split: [tuple(piece) for piece in pieces]}, x)

    assert torch.equal(found, torch.where(torch.from_numpy(KEEP), -x, 0))


# --- what looks at all elements of a dim sees those that are kept

OVER_LAST = {
    "mean": lambda x: x.mean(-1),
    "mean keepdim": lambda x: x.mean(-1, keepdim=True),
    "mean of several": lambda x: x.mean((1, 2)),
    "mean of all": lambda x: x.mean().expand(x.shape[0]),
    "sum": lambda x: x.sum(-1),
    "var": lambda x: x.var(-1),
    "biased var": lambda x: x.var((1, 2), correction=0, keepdim=True),
    "std": lambda x: x.std(-1),
    "var_mean": lambda x: torch.cat(torch.var_mean(x, -1), 1),
    "std_mean": lambda x: torch.cat(torch.std_mean(x, -1), 1),
    "amax": lambda x: x.amax(-1),
    "amin": lambda x: x.amin(-1),
    "max": lambda x: x.max().expand(x.shape[0]),
    "min": lambda x: x.min().expand(x.shape[0]),
    "aminmax": lambda x: torch.cat(torch.aminmax(x, dim=-1), 1),
    "prod": lambda x: x.prod(-1),
    "logsumexp": lambda x: x.logsumexp(-1),
    "norm": lambda x: torch.linalg.vector_norm(x, 2, -1),
    "norm of largest": lambda x: torch.linalg.vector_norm(x, float("inf"), -1),
    "norm of least": lambda x: torch.linalg.vector_norm(x, -float("inf"), -1),
    "all": lambda x: (x > -1).all(-1).double(),
    "any": lambda x: (x > 1).any(-1).double(),
    "cosine": lambda x: F.cosine_similarity(x, x.square(), dim=-1),
}


def over_last(function):
    x = inputs(3, 5, 6) - 3
    program = traced(Wire(lambda m, x: function(x.exp().neg())), x)
    shrinks = {node.name: (ALL, (KeptFactor(5),), SOME) for node in program.nodes if rank_of(node) == (5, 6)}
    return program, shrinks, x


def rank_of(node):
    value = node.meta.get("val")
    return tuple(value.shape[1:]) if isinstance(value, torch.Tensor) and node.op == "call_function" else None


@pytest.mark.parametrize("name", OVER_LAST)
def test_reductions_are_over_what_is_kept(name):
    program, kept, x = over_last(OVER_LAST[name])

    found = masked(program, kept, x)

    torch.testing.assert_close(found, OVER_LAST[name](x[..., KEEP].exp().neg()), rtol=1e-12, atol=1e-15)


SAME_SHAPE = {
    "softmax": lambda x, gain: x.softmax(-1),
    "log_softmax": lambda x, gain: x.log_softmax(-1).exp(),
    "layer_norm": lambda x, gain: F.layer_norm(x, (x.shape[-1],), gain, gain, 1e-3),
    "layer_norm without weights": lambda x, gain: F.layer_norm(x, (x.shape[-1],)),
    "layer_norm of two dims": lambda x, gain: F.layer_norm(x, x.shape[1:]),
    "rms_norm": lambda x, gain: F.rms_norm(x, (x.shape[-1],), gain, 1e-3),
    "rms_norm with its own eps": lambda x, gain: F.rms_norm(x, (x.shape[-1],)),
    "normalize": lambda x, gain: F.normalize(x, dim=-1),
}


@pytest.mark.parametrize("name", SAME_SHAPE)
def test_normalisers_are_over_what_is_kept(name):
    x = inputs(3, 5, 6)
    program = traced(Wire(lambda m, x: SAME_SHAPE[name](x.exp(), m.gain), gain=weight(6)), x)
    gain = dict(program.graph_module.named_parameters()).get("gain")
    kept = {node.name: (ALL, (KeptFactor(5),), SOME) for node in program.nodes if rank_of(node) == (5, 6)}

    found = masked(program, kept, x)

    expected = SAME_SHAPE[name](x[..., KEEP].exp(), gain if gain is None else gain[KEEP])
    torch.testing.assert_close(found[..., KEEP], expected, rtol=1e-12, atol=0)
    assert not found[..., ~KEEP].any()


@pytest.mark.parametrize(
    ("keep", "groups", "left"),
    [([1, 0, 1, 1, 0, 1], 2, 2), ([1, 1, 1, 0, 0, 0], 2, 1), ([1, 0, 1, 0, 1, 0], 3, 3), ([1, 1, 0, 0, 1, 1], 3, 2)],
)
def test_group_norm_counts_kept_channels_of_kept_groups(keep, groups, left):
    keep, x = np.array(keep, bool), inputs(2, 6, 4, 4)
    program = traced(Wire(lambda m, x: m.norm(x.exp()), norm=nn.GroupNorm(groups, 6, eps=1e-3)), x)
    norm = program.graph_module.get_submodule("norm")
    kept = (ALL, (KeptFactor(6, keep),), (KeptFactor(4),), (KeptFactor(4),))

    found = masked(program, {"exp": kept, "norm": kept}, x)

    expected = F.group_norm(x[:, keep].exp(), left, norm.weight[keep], norm.bias[keep], norm.eps)
    torch.testing.assert_close(found[:, keep], expected, rtol=1e-12, atol=0)
    assert not found[:, ~keep].any()


@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_attention_gives_removed_source_positions_no_weight(mask):
    query, key = inputs(2, 1, 4, 3), inputs(2, 1, 6, 3, seed=2)
    added = {None: None, "bool": inputs(4, 6) > -0.5, "float": inputs(4, 6)}[mask]

    def attend(query, key, mask):
        return F.scaled_dot_product_attention(query, key.cos(), key.sin(), mask)

    model = Wire(lambda m, query, key: attend(query, key, m.mask if mask else None))
    model.register_buffer("mask", added)
    program = traced(model, query, key)
    shape = (ALL, (KeptFactor(1),), SOME, (KeptFactor(3),))

    found = masked(program, {"cos": shape, "sin": shape}, query, key)

    expected = attend(query, key[:, :, KEEP], added if added is None else added[:, KEEP])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


# --- the check -------------------------------------------------------------------------------------------------------


def slim(program, columns=None):
    """Linear, ReLU, Linear without the second and fifth hidden unit."""
    after = program.copy()
    root = after.graph_module
    first, second = root.get_submodule("0"), root.get_submodule("2")
    columns = KEEP if columns is None else columns
    for name, tensor in (
        ("0.weight", first.weight[KEEP]), ("0.bias", first.bias[KEEP]), ("2.weight", second.weight[:, columns]),
    ):  # fmt: skip
        set_state(root, name, nn.Parameter(tensor.detach()))
    return after


KEPT = {"_0": (ALL, SOME), "relu": (ALL, SOME)}


def mlp():
    return traced(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), inputs(3, 4))


def test_accepts_what_is_right():
    before = mlp()

    assert check_removal(before, slim(before), KEPT).max_rel_error < 1e-14


def test_refuses_a_column_too_far():
    before = mlp()

    with pytest.raises(VerificationError, match=r"removal must leave what the masked model computes.*allowed: 1e-09"):
        check_removal(before, slim(before, np.roll(KEEP, 1)), KEPT)


def test_refuses_an_error_that_only_another_batch_shows():
    before = mlp()
    after = slim(before)
    (call,) = after.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
    with after.graph.inserting_after(call):
        turned = after.graph.call_function(torch.ops.aten.roll.default, (call, [3], [0]))  # all of the example's rows
    turned.meta["val"] = call.meta["val"]
    call.replace_all_uses_with(turned, delete_user_cb=lambda user: user is not turned)
    after.graph_module.recompile()

    with pytest.raises(VerificationError, match="removal must leave"):
        check_removal(before, after, KEPT)
