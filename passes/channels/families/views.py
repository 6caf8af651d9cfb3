"""Operators that rearrange dims: reshape, permute, expand, repeat, pixel shuffle."""

from __future__ import annotations

from typing import Any

import torch
from fxcompress.passes.channels.layout import Dim, Layout, position
from fxcompress.passes.channels.rules import Call, dropped, normalized_dim, replaced, rule

aten = torch.ops.aten


@rule(aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int, aten.squeeze.default)
def reshape(call: Call) -> Layout:
    """Merged dims become products, split dims are factored."""
    return call.algebra.reshape(call.layout("self"), call.shape)


@rule(aten.permute.default)
def permute(call: Call) -> Layout:
    """Dims change places."""
    x = call.layout("self")
    return tuple(x[normalized_dim(dim, len(x))] for dim in call["dims"])


@rule(aten.transpose.int, aten.swapdims.default, aten.swapaxes.default)
def transpose(call: Call) -> Layout:
    """Two dims change places."""
    x = call.layout("self")
    first, second = ("axis0", "axis1") if "axis0" in call.operation.arguments else ("dim0", "dim1")
    a, b = normalized_dim(call[first], len(x)), normalized_dim(call[second], len(x))
    return replaced(x, {a: x[b], b: x[a]})


@rule(aten.rot90.default)
def rot90(call: Call) -> Layout:
    """Quarter turns of two dims, which change places after an odd number; places move, so both stay."""
    x = call.layout("self")
    a, b = (normalized_dim(dim, len(x)) for dim in call["dims"])
    call.keep(x[a], x[b])
    return replaced(x, {a: x[b], b: x[a]}) if call["k"] % 2 else x


@rule(aten.t.default, aten.numpy_T.default)
def turned(call: Call) -> Layout:
    """All dims, the last first."""
    return call.layout("self")[::-1]


@rule(aten.mT.default)
def turned_matrices(call: Call) -> Layout:
    """The last two dims change places."""
    x = call.layout("self")
    return (*x[:-2], *reversed(x[-2:]))


@rule(aten.movedim.int, aten.movedim.intlist)
def movedim(call: Call) -> Layout:
    """Dims move, the others keep their order."""
    x = call.layout("self")

    def listed(name: str) -> list[int]:
        value = call[name]
        return [normalized_dim(dim, len(x)) for dim in (value if isinstance(value, (list, tuple)) else [value])]

    source, target = listed("source"), listed("destination")
    rest = iter([dim for dim in range(len(x)) if dim not in source])
    return tuple(x[source[target.index(d)]] if d in target else x[next(rest)] for d in range(len(x)))


@rule(aten.unsqueeze.default)
def unsqueeze(call: Call) -> Layout:
    """A dim of size 1 more."""
    x = call.layout("self")
    dim = normalized_dim(call["dim"], len(x) + 1)
    return (*x[:dim], (), *x[dim:])


@rule(aten.squeeze.dim, aten.squeeze.dims)
def squeeze(call: Call) -> Layout:
    """Dims of size 1 fewer."""
    x = call.layout("self")
    given = call["dim"]
    dims = given if isinstance(given, (list, tuple)) else [given]
    return dropped(x, [dim for dim in dims if not x[normalized_dim(dim, len(x))]])


@rule(aten.expand.default)
def expand(call: Call) -> Layout:
    """Copies along a dim of size 1 are new elements: any number of them will do."""
    x = call.layout("self")
    padded: list[Dim] = [()] * (len(call.shape) - len(x)) + list(x)
    value = call.operation.node.meta["val"]
    return tuple(
        dim if dim or size == 1 else call.fresh(size) if isinstance(value.shape[index], int) else position(size)
        for index, (dim, size) in enumerate(zip(padded, call.shape, strict=True))
    )


def _copies(call: Call, count: Any) -> Dim:
    """Copies of one value: any number of them will do, where it is known."""
    size = call.size(count)
    return call.fresh(size) if isinstance(count, int) and size < 1 << 20 else position(size)


@rule(aten.repeat.default, aten.tile.default)
def repeat(call: Call) -> Layout:
    """Dim after dim, copies of the whole: (copies, elements)."""
    x = call.layout("self")
    times = call.operation.arguments.get("repeats", call.operation.arguments.get("dims"))
    padded: list[Dim] = [()] * (len(call.shape) - len(x)) + list(x)
    times = [1] * (len(padded) - len(times)) + list(times)
    return tuple((*_copies(call, count), *dim) for count, dim in zip(times, padded, strict=True))


@rule(aten.repeat_interleave.self_int)
def repeat_interleave(call: Call) -> Layout:
    """Copies of each element: (elements, copies)."""
    x = call.layout("self")
    if call["dim"] is None:
        whole = tuple(factor for dim in x for factor in dim)
        return ((*whole, *position(call.size(call["repeats"]))),)
    dim = normalized_dim(call["dim"], len(x))
    return replaced(x, {dim: (*x[dim], *_copies(call, call["repeats"]))})


@rule(aten.pixel_shuffle.default)
def pixel_shuffle(call: Call) -> Layout:
    """Channels (C, r * r) give C channels on a grid that is finer by r."""
    x = call.layout("self")
    channels, places = call.algebra.split(x[-3], call.shape[-3])
    call.keep(places, x[-2], x[-1])
    return (*x[:-3], channels, position(call.shape[-2]), position(call.shape[-1]))


@rule(aten.pixel_unshuffle.default)
def pixel_unshuffle(call: Call) -> Layout:
    """Every r x r block of a channel becomes r * r channels, channel outermost."""
    x = call.layout("self")
    call.keep(x[-2], x[-1])
    factor = call["downscale_factor"]
    return (*x[:-3], (*x[-3], *position(factor * factor)), position(call.shape[-2]), position(call.shape[-1]))


@rule(aten.unfold.default)
def unfold(call: Call) -> Layout:
    """Windows along a dim, which must stay; their content is a new last dim."""
    x = call.layout("self")
    dim = normalized_dim(call["dimension"], len(x))
    call.keep(x[dim])
    return (*replaced(x, {dim: position(call.shape[dim])}), position(call.shape[-1]))


@rule(aten.im2col.default)
def im2col(call: Call) -> Layout:
    """Patches as columns: (channels, taps) by places."""
    x = call.layout("self")
    call.keep(*x[-2:])
    taps = position(call["kernel_size"][0] * call["kernel_size"][1])
    return (*x[:-3], (*x[-3], *taps), position(call.shape[-1]))


@rule(aten.col2im.default)
def col2im(call: Call) -> Layout:
    """Columns back to an image: the inverse of im2col."""
    x = call.layout("self")
    channels, taps = call.algebra.split(x[-2], call.shape[-3])
    call.keep(taps, x[-1])
    return (*x[:-2], channels, position(call.shape[-2]), position(call.shape[-1]))


@rule(aten.view_as_complex.default)
def view_as_complex(call: Call) -> Layout:
    """Pairs become complex numbers."""
    x = call.layout("self")
    call.keep(x[-1])
    return x[:-1]


@rule(aten.view_as_real.default)
def view_as_real(call: Call) -> Layout:
    """Complex numbers become pairs."""
    return (*call.layout("self"), position(2))


@rule(aten.diagonal.default)
def diagonal(call: Call) -> Layout:
    """A diagonal of two dims, which stay."""
    x = call.layout("self")
    dims = [normalized_dim(call["dim1"], len(x)), normalized_dim(call["dim2"], len(x))]
    call.keep(*(x[dim] for dim in dims))
    return (*dropped(x, dims), position(call.shape[-1]))
