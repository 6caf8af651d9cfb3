"""What a Program is made of, cheaply: enough to tell whether a pass changed it, without reading a weight.

Tensors count by identity and version, so replacing one and writing into one both show (a write through ``.data`` does
not; :func:`checksums` sees that, at the cost of reading every weight).
"""

from __future__ import annotations

import functools
import operator
import zlib
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxcompress.ir.program import Interface, Program

_DERIVED_META = frozenset({"val", "tensor_meta"})
"""Node metadata that follows from the graph; the verifier checks it."""

_PLAIN = frozenset({int, float, bool, str, type(None), torch.dtype})

_Module = tuple[type[nn.Module], frozenset[str], tuple[str, ...], tuple[Any, ...]]
"""Type, buffers that are not saved, names of attributes, their values."""

_Node = tuple[tuple[str, Any, tuple[Any, ...], Mapping[str, Any]], Mapping[str, Any]]
"""Operator, target and arguments; metadata."""


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """What there is in a Program, by name and in order; :func:`difference` compares two.

    What can be replaced but not written into (a node's arguments, a number among a module's attributes) is kept as it
    is, and only taken apart where the other Fingerprint has another object in its place.

    Attributes:
        interface: How the Program is called.
        modules: Types, attributes, and which buffers are not saved.
        tensors: Identities and versions.
        nodes: Operator, target, arguments and metadata.
        kept: Tensors, so that no address is used again.
    """

    interface: Interface
    modules: Mapping[str, _Module]
    tensors: Mapping[str, Hashable]
    nodes: Mapping[str, _Node]
    kept: tuple[torch.Tensor, ...]


def fingerprint(program: Program) -> Fingerprint:
    """The fingerprint of a Program; O(nodes + modules), reads no tensor."""
    modules: dict[str, _Module] = {}
    tensors: dict[str, Hashable] = {}
    kept: list[torch.Tensor] = []
    pending: list[tuple[str, nn.Module]] = [("", program.graph_module)]
    for path, module in pending:
        names, values = _attributes(module) if path else ((), ())  # the root's are its graph's
        kind = type(module) if path else nn.Module
        modules[path] = (kind, frozenset(module._non_persistent_buffers_set), names, values)
        prefix = f"{path}." if path else ""
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                kept.append(tensor)
                tensors[prefix + leaf] = (id(tensor), _version(tensor), type(tensor), tensor.requires_grad)
        pending += [(prefix + name, child) for name, child in module._modules.items() if child is not None]
    nodes = {n.name: ((n.op, n.target, n.args, n.kwargs), n.meta.copy()) for n in program.nodes}
    return Fingerprint(program.interface, modules, tensors, nodes, tuple(kept))


def difference(before: Fingerprint, after: Fingerprint) -> str | None:
    """The first part that differs, in words, or ``None`` when nothing does."""
    if before.interface is not after.interface:
        return "the interface is different"
    return (
        _difference("module", before.modules, after.modules, _same_module)
        or _difference("tensor", before.tensors, after.tensors, operator.eq)
        or _difference("node", before.nodes, after.nodes, _same_node)
    )


def _difference(
    kind: str, before: Mapping[str, Any], after: Mapping[str, Any], same: Callable[[Any, Any], bool]
) -> str | None:
    for name, part in before.items():
        if name not in after:
            return f"{kind} {name!r} is gone"
        if not same(part, after[name]):
            return f"{kind} {name!r} is different"
    new = next((name for name in after if name not in before), None)
    if new is not None:
        return f"{kind} {new!r} is new"
    return None if list(before) == list(after) else f"the order of {kind}s is different"


def _same_module(a: _Module, b: _Module) -> bool:
    return a[:3] == b[:3] and _same_values(a[3], b[3])


def _same_node(a: _Node, b: _Node) -> bool:
    return _same_values(a[0], b[0]) and _same_meta(a[1], b[1])


def _same_values(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return all(map(operator.is_, a, b)) or all(
        _freeze(x) == _freeze(y) for x, y in zip(a, b, strict=True) if x is not y
    )


def _same_meta(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    untouched = a.keys() == b.keys() and all(map(operator.is_, a.values(), b.values()))
    return untouched or _identities(a) == _identities(b)


def _identities(meta: Mapping[str, Any]) -> Hashable:
    return tuple(
        (key, value if isinstance(value, (str, int, float)) else id(value))
        for key, value in meta.items()
        if key not in _DERIVED_META
    )


def checksums(program: Program) -> dict[str, int]:
    """CRC-32 of every parameter and buffer by name; tensors without plain storage (meta, sparse) are left out."""
    return {
        name: _crc(tensor) for name, tensor in _state(program) if tensor.layout == torch.strided and _has_bytes(tensor)
    }


def _has_bytes(tensor: torch.Tensor) -> bool:
    return not (tensor.is_meta or tensor.is_quantized)


def _crc(tensor: torch.Tensor) -> int:
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().data) if flat.numel() else 0


def _state(program: Program) -> list[tuple[str, torch.Tensor]]:
    root = program.graph_module
    return [*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False)]


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _attributes(module: nn.Module) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    held = vars(module)
    names = _public(tuple(held))
    return names, tuple([value if type(value) in _PLAIN else _snapshot(value) for value in map(held.get, names)])


@functools.lru_cache(maxsize=1024)
def _public(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if name[0] != "_")


def _snapshot(value: Any) -> Any:
    """What cannot be written into as it is, all else taken apart."""
    return value if type(value) is tuple and _PLAIN.issuperset(map(type, value)) else _freeze(value)


@functools.singledispatch
def _freeze(value: Any) -> Hashable:
    try:
        hash(value)
    except TypeError:
        return (type(value), id(value))
    return (type(value), value)


@_freeze.register
def _(value: fx.Node) -> Hashable:
    return ("%", value.name)


@_freeze.register
def _(value: torch.Tensor) -> Hashable:
    return (id(value), _version(value))


@_freeze.register
def _(value: tuple) -> Hashable:  # type: ignore[type-arg]
    return ("tuple", *map(_freeze, value))


@_freeze.register
def _(value: list) -> Hashable:  # type: ignore[type-arg]
    return ("list", *map(_freeze, value))


@_freeze.register
def _(value: dict) -> Hashable:  # type: ignore[type-arg]
    return ("dict", *((key, _freeze(item)) for key, item in value.items()))


@_freeze.register
def _(value: slice) -> Hashable:
    return ("slice", *map(_freeze, (value.start, value.stop, value.step)))
