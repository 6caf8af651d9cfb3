"""Normalisers and other reductions over dims."""

from __future__ import annotations

import torch
from fxcompress.passes.channels.layout import Layout, broadcast, position
from fxcompress.passes.channels.rules import Call, Result, dropped, normalized_dim, replaced, rule

aten = torch.ops.aten


@rule(aten.batch_norm.default, aten.instance_norm.default)
def batch_norm(call: Call) -> Layout:
    """One weight, bias, mean and variance a channel, dim 1."""
    x = call.layout("input")
    for name in ("weight", "bias", "running_mean", "running_var"):
        if call.given(name):
            call.join(x[1], call.layout(name)[0])
    return x


@rule(aten.layer_norm.default, aten.rms_norm.default)
def layer_norm(call: Call) -> Layout:
    """One weight and bias an element of the last dims."""
    x = call.layout("input")
    for name in ("weight", "bias"):
        if call.operation.arguments.get(name) is not None:
            weight = call.layout(name)
            for a, b in zip(x[len(x) - len(weight) :], weight, strict=True):
                call.join(a, b)
    return x


@rule(aten._weight_norm.default)
def weight_norm(call: Call) -> Layout:
    """A direction, and a length for each index of one dim."""
    return broadcast(call.algebra, [call.layout("v"), call.layout("g")])


@rule(aten.group_norm.default)
def group_norm(call: Call) -> Layout:
    """Channels are (groups, channels in a group)."""
    x = call.layout("input")
    groups, inside = call.algebra.split(x[1], call["num_groups"])
    for name in ("weight", "bias"):
        if call.given(name):
            call.join(x[1], call.layout(name)[0])
    return replaced(x, {1: (*groups, *inside)})


@rule(
    aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default,
    aten._safe_softmax.default, aten.renorm.default,
)  # fmt: skip
def softmax(call: Call) -> Layout:
    """Elements are divided by a total over some dims."""
    return call.layout("self")


def _reduced_dims(call: Call, rank: int) -> list[int]:
    given = call.operation.arguments.get("dim")
    if given is None or given == []:
        return list(range(rank))
    return [normalized_dim(dim, rank) for dim in (given if isinstance(given, (list, tuple)) else [given])]


@rule(
    aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim, aten.amax.default, aten.amin.default,
    aten.prod.default, aten.prod.dim_int, aten.logsumexp.default, aten.linalg_vector_norm.default,
    aten.norm.ScalarOpt_dim, aten.norm.Scalar, aten.var.correction, aten.var.dim, aten.var.default,
    aten.std.correction, aten.std.dim, aten.std.default, aten.any.dim, aten.all.dim, aten.any.default,
    aten.all.default, aten.any.dims, aten.all.dims, aten.max.default, aten.min.default, aten.frobenius_norm.dim,
    aten.nansum.default, aten.nanmean.default, aten.count_nonzero.default, aten.count_nonzero.dim_IntList,
)  # fmt: skip
def reduction(call: Call) -> Layout:
    """The reduced dims are gone."""
    x = next(iter(call.operands()))
    return dropped(x, _reduced_dims(call, len(x)), bool(call.operation.arguments.get("keepdim", False)))


@rule(
    aten.linalg_norm.default, aten.linalg_norm.ord_str, aten.linalg_matrix_norm.default,
    aten.linalg_matrix_norm.str_ord,
)  # fmt: skip
def norm(call: Call) -> Layout:
    """As any reduction, but for matrices of negative order: those look for the smallest, which a row of zeros is."""
    x, order = call.layout("self"), call["ord"]
    dims = _reduced_dims(call, len(x))
    if len(dims) == 2 and isinstance(order, (int, float)) and order < 0:
        call.keep(*(x[dim] for dim in dims))
    return dropped(x, dims, call["keepdim"])


@rule(aten.var_mean.correction, aten.var_mean.dim, aten.std_mean.correction, aten.std_mean.dim, aten.aminmax.default)
def paired_reduction(call: Call) -> list[Layout]:
    """Two results, both without the reduced dims."""
    x = call.operands()[0]
    layout = dropped(x, _reduced_dims(call, len(x)), bool(call.operation.arguments.get("keepdim", False)))
    return [layout, layout]


@rule(aten.max.dim, aten.min.dim)
def extreme(call: Call) -> list[Layout]:
    """A value and its place: the dim stays where anything reads places, since they are numbered."""
    x = call.layout("self")
    if any(user.args[1] == 1 for user in call.operation.node.users):
        call.keep(x[normalized_dim(call["dim"], len(x))])
    layout = dropped(x, [call["dim"]], call["keepdim"])
    return [layout, layout]


@rule(aten.median.dim, aten.mode.default, aten.kthvalue.default)
def ranked(call: Call) -> list[Layout]:
    """A value whose rank counts what is beside it, and its place: the dim stays."""
    x = call.layout("self")
    call.keep(x[normalized_dim(call["dim"], len(x))])
    layout = dropped(x, [call["dim"]], call["keepdim"])
    return [layout, layout]


@rule(aten.argmax.default, aten.argmin.default)
def place(call: Call) -> Layout:
    """Places are numbered, so the dim stays."""
    x = call.layout("self")
    dims = _reduced_dims(call, len(x))
    call.keep(*(x[dim] for dim in dims))
    return dropped(x, dims, call["keepdim"])


@rule(aten.topk.default, aten.sort.default, aten.sort.stable, aten.cummax.default, aten.cummin.default)
def sorted_(call: Call) -> list[Layout]:
    """Places along a dim are numbered, so it stays."""
    x = call.layout("self")
    dim = normalized_dim(call["dim"], len(x))
    call.keep(x[dim])
    layout = replaced(x, {dim: position(call.shapes[0][dim])})
    return [layout, layout]


@rule(aten.argsort.default, aten.argsort.stable)
def argsort(call: Call) -> Result:
    """Places along a dim are numbered, so it stays."""
    x = call.layout("self")
    call.keep(x[normalized_dim(call["dim"], len(x))])
    return x


@rule(aten.cosine_similarity.default, aten.linalg_vecdot.default)
def cosine_similarity(call: Call) -> Layout:
    """Two operands meet on a dim, which is gone."""
    return dropped(broadcast(call.algebra, call.operands()), [call["dim"]])
