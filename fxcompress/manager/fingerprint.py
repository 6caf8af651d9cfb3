"""What a Program is made of, cheaply: enough to tell whether a pass changed it, without reading a weight.

Tensors count by identity and version, so replacing one and writing into one both show (a write through ``.data`` does
not; :func:`checksums` sees that, at the cost of reading every weight).
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from fxcompress.ir.program import Program

_DERIVED_META = ("val", "tensor_meta")
"""Node metadata that follows from the graph; the verifier checks it."""


@dataclass(frozen=True)
class Fingerprint:
    """Parts of a Program by what they are called; equal fingerprints mean equal Programs.

    Attributes:
        parts: Label such as ``node 'relu'`` or ``tensor 'conv.weight'`` -> what is there, in graph order.
        kept: Objects that are told apart by address, held so that no address is used again.
    """

    parts: Mapping[str, Hashable]
    kept: tuple[Any, ...] = field(compare=False, repr=False)


def fingerprint(program: Program) -> Fingerprint:
    """The fingerprint of a Program; O(nodes + modules), reads no tensor."""
    parts: dict[str, Hashable] = {"interface": id(program.interface)}
    kept: list[Any] = [program.interface]
    for node in program.nodes:
        meta = {key: value for key, value in node.meta.items() if key not in _DERIVED_META}
        kept += meta.values()
        parts[f"node {node.name!r}"] = (
            node.op, _freeze(node.target), _freeze(node.args), _freeze(node.kwargs), _identities(meta)
        )  # fmt: skip
    for path, module in program.graph_module.named_modules(remove_duplicate=False):
        if path:
            parts[f"module {path!r}"] = (type(module), _freeze(_attributes(module)))
    for name, tensor in _state(program):
        kept.append(tensor)
        parts[f"tensor {name!r}"] = (id(tensor), _version(tensor), type(tensor), tensor.requires_grad)
    parts["order of nodes"] = tuple(node.name for node in program.nodes)
    parts["persistent state"] = tuple(program.graph_module.state_dict(keep_vars=True))
    return Fingerprint(parts, tuple(kept))


def difference(before: Fingerprint, after: Fingerprint) -> str | None:
    """The first part that differs, in words, or ``None`` when nothing does."""
    for label, part in before.parts.items():
        if label not in after.parts:
            return f"{label} is gone"
        if part != after.parts[label]:
            return f"{label} is different"
    return next((f"{label} is new" for label in after.parts if label not in before.parts), None)


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


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if not name.startswith("_")}


def _identities(meta: Mapping[str, Any]) -> Hashable:
    return tuple((key, value if isinstance(value, (str, int, float)) else id(value)) for key, value in meta.items())


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
