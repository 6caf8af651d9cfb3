"""Operators that sum products: linear, matmul, einsum, attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from fxcompress.passes.channels.layout import Dim, Layout, broadcast, dim_size
from fxcompress.passes.channels.rules import Call, dropped, pointwise, rule

aten = torch.ops.aten


@rule(aten.linear.default)
def linear(call: Call) -> Layout:
    """``y[..., o] = sum_i x[..., i] weight[o, i] + bias[o]``."""
    x, weight = call.layout("input"), call.layout("weight")
    call.join(x[-1], weight[-1])
    if len(weight) == 1:
        return x[:-1]
    if call.given("bias"):
        bias = call.layout("bias")
        if bias and bias[-1]:
            call.join(weight[0], bias[-1])
    return (*x[:-1], weight[0])


def product(call: Call, a: Layout, b: Layout) -> Layout:
    """``torch.matmul``: the last dim of ``a`` against the last but one of ``b``, batch dims broadcast."""
    if len(a) == 1 or len(b) == 1:
        call.join(a[-1], b[-1] if len(b) == 1 else b[-2])
        return (*a[:-1], *(b[:-2] if len(b) > 1 else ()), *(b[-1:] if len(b) > 1 else ()))
    call.join(a[-1], b[-2])
    return (*broadcast(call.algebra, [a[:-2], b[:-2]]), a[-2], b[-1])


@rule(aten.matmul.default)
def matmul(call: Call) -> Layout:
    """Product of stacked matrices."""
    return product(call, call.layout("self"), call.layout("other"))


@rule(aten.mm.default, aten.bmm.default)
def mm(call: Call) -> Layout:
    """Product of matrices."""
    return product(call, call.layout("self"), call.layout("mat2"))


@rule(aten.mv.default)
def mv(call: Call) -> Layout:
    """Matrix times vector."""
    return product(call, call.layout("self"), call.layout("vec"))


@rule(aten.dot.default)
def dot(call: Call) -> Layout:
    """Product of vectors."""
    return product(call, call.layout("self"), call.layout("tensor"))


@rule(aten.vdot.default)
def vdot(call: Call) -> Layout:
    """Product of vectors, the first conjugated."""
    return product(call, call.layout("self"), call.layout("other"))


@rule(aten.addmm.default)
def addmm(call: Call) -> Layout:
    """``input + mat1 @ mat2``."""
    return broadcast(call.algebra, [product(call, call.layout("mat1"), call.layout("mat2")), call.layout("self")])


@rule(aten.baddbmm.default)
def baddbmm(call: Call) -> Layout:
    """``input + batch1 @ batch2``."""
    return broadcast(call.algebra, [product(call, call.layout("batch1"), call.layout("batch2")), call.layout("self")])


@rule(aten.tensordot.default)
def tensordot(call: Call) -> Layout:
    """Listed dims of both meet and are gone."""
    return _contracted(call, call.layout("self"), call.layout("other"), call["dims_self"], call["dims_other"])


@rule(aten.inner.default)
def inner(call: Call) -> Layout:
    """The last dims meet and are gone; a number scales the other operand."""
    a, b = call.layout("self"), call.layout("other")
    return _contracted(call, a, b, [-1], [-1]) if a and b else pointwise(call)


def _contracted(call: Call, a: Layout, b: Layout, dims_a: Sequence[int], dims_b: Sequence[int]) -> Layout:
    """What is left of both; a dim of size 1 meets one of any size, which is summed."""
    for place_a, place_b in zip(dims_a, dims_b, strict=True):
        if a[place_a] and b[place_b]:
            call.join(a[place_a], b[place_b])
    return (*dropped(a, dims_a), *dropped(b, dims_b))


@rule(aten.outer.default)
def outer(call: Call) -> Layout:
    """All products of two vectors."""
    return (*call.layout("self"), *call.layout("vec2"))


@rule(aten.bilinear.default)
def bilinear(call: Call) -> Layout:
    """``y[o] = x1[i] weight[o, i, j] x2[j] + bias[o]``."""
    a, b, weight = call.layout("input1"), call.layout("input2"), call.layout("weight")
    call.join(a[-1], weight[1])
    call.join(b[-1], weight[2])
    if call.given("bias"):
        call.join(weight[0], call.layout("bias")[0])
    return (*broadcast(call.algebra, [a[:-1], b[:-1]]), weight[0])


@rule(aten.einsum.default)
def einsum(call: Call) -> Layout:
    """Dims of one letter are one."""
    operands = call.tensors("tensors")
    text = call["equation"].replace(" ", "")
    left, arrow, right = text.partition("->")
    terms = left.split(",")
    known: dict[str, Dim] = {}
    ellipses: list[Layout] = []
    for term, layout in zip(terms, operands, strict=True):
        head, dots, tail = term.partition("...")
        inside = layout[len(head) : len(layout) - len(tail)] if dots else ()
        ellipses.append(inside)
        named = (*layout[: len(head)], *layout[len(layout) - len(tail) :]) if dots else layout
        for letter, dim in zip(head + tail, named, strict=True):
            if known.get(letter) and dim:
                call.join(known[letter], dim)
            else:
                known[letter] = dim or known.get(letter, ())
    shared = broadcast(call.algebra, ellipses)
    if not arrow:
        letters = "".join(terms).replace(".", "")
        right = ("..." if "..." in left else "") + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    head, dots, tail = right.partition("...")
    middle = shared if dots else ()
    return (*(known[letter] for letter in head), *middle, *(known[letter] for letter in tail))


@rule(aten.scaled_dot_product_attention.default)
def attention(call: Call) -> Layout:
    """Queries meet keys on head dims, weights meet values on source positions, batch dims and heads are one.

    With ``enable_gqa``, query heads are (key heads, queries of one key).
    """
    query, key, value = (call.layout(name) for name in ("query", "key", "value"))
    call.join(query[-1], key[-1])
    call.join(key[-2], value[-2])
    if call["enable_gqa"] and dim_size(query[-3]) != dim_size(key[-3]):
        groups, _ = call.algebra.split(query[-3], dim_size(key[-3]))
        call.join(groups, key[-3])
        call.join(key[-3], value[-3])
        batch = (*broadcast(call.algebra, [query[:-3], key[:-3], value[:-3]]), query[-3])
    else:
        batch = broadcast(call.algebra, [query[:-2], key[:-2], value[:-2]])
    if call.given("attn_mask"):
        broadcast(call.algebra, [(*batch, query[-2], key[-2]), call.layout("attn_mask")])
    return (*batch, query[-2], value[-1])


@rule(aten.cdist.default)
def cdist(call: Call) -> Layout:
    """Distances between rows."""
    a, b = call.layout("x1"), call.layout("x2")
    call.join(a[-1], b[-1])
    return (*broadcast(call.algebra, [a[:-2], b[:-2]]), a[-2], b[-2])


@rule("aten::_grouped_mm", "transformers::grouped_mm_fallback")
def grouped_mm(call: Call) -> Layout:
    """Rows go through the matrix of their expert ``(experts, inputs, outputs)``; rows choose, so all experts stay."""
    x, experts = call.operands()[:2]
    if len(x) != 2 or len(experts) != 3:
        return call.barrier()  # type: ignore[return-value]
    call.keep(x[0], experts[0])
    call.join(x[1], experts[1])
    return (x[0], experts[2])
