"""The caller's interface as data: the trees of inputs and outputs, and the example inputs.

A class in a tree (a dataclass, a Hugging Face ``ModelOutput``, a named tuple) is saved by name with its field names. It
is found again only among the classes that are registered with pytree in the loading process; otherwise a dict of the
fields (or a tuple, where there are none) takes its place. Nothing that a file names is imported.
"""

from __future__ import annotations

import base64
from collections import OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from fxcompress.artifact.values import Decoder, encode, import_library
from fxcompress.errors import ArtifactError
from fxcompress.ir.program import Interface

_LEAF = tree_flatten(0)[1]

_BUILT_IN: Mapping[str, type] = {"tuple": tuple, "list": list, "dict": dict, "OrderedDict": OrderedDict}
_BUILT_IN_NAMES = {kind: name for name, kind in _BUILT_IN.items()}


def encode_tree(spec: TreeSpec) -> Any:
    """A tree as JSON data; ``None`` is a leaf."""
    if spec.is_leaf():
        return None
    children = [encode_tree(child) for child in children_of(spec)]
    if spec.type in _BUILT_IN_NAMES:
        return {"kind": _BUILT_IN_NAMES[spec.type], "context": encode(spec.context), "children": children}
    if spec.type is defaultdict:  # [default factory, keys]: a factory is code
        return {"kind": "dict", "context": encode(spec.context[1]), "children": children}
    if spec.type is deque:
        return {"kind": "list", "context": None, "children": children}
    if spec.type is namedtuple:
        return {"kind": "named tuple", "class": _name(spec.context), "children": children}
    return {
        "kind": "class",
        "class": _name(spec.type),
        "context": _context(spec),
        "fields": _fields(spec),
        "children": children,
    }


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _context(spec: TreeSpec) -> Any:
    try:
        return encode(spec.context)
    except ArtifactError as error:
        raise ArtifactError(
            f"the structure {spec.type.__name__} cannot be saved: {error}; return a dict instead"
        ) from error


def _fields(spec: TreeSpec) -> list[str] | None:
    """Names of the children, where the context lists them: ``[names]`` or ``[[names], ...]`` (a dataclass)."""
    candidates = (spec.context, *spec.context) if isinstance(spec.context, (list, tuple)) else ()
    for names in candidates:
        listed = isinstance(names, (list, tuple)) and len(names) == spec.num_children
        if listed and all(isinstance(name, str) for name in names):
            return list(names)
    return None


def decode_tree(data: Any, decoder: Decoder) -> TreeSpec:
    """The tree that :func:`encode_tree` saved; classes that this process does not know become dicts or tuples."""
    if data is None:
        return _LEAF
    children = [decode_tree(child, decoder) for child in data["children"]]
    return _NODES[data["kind"]](data, children, decoder)


def _built_in(data: Any, children: list[TreeSpec], decoder: Decoder) -> TreeSpec:
    return TreeSpec(_BUILT_IN[data["kind"]], decoder(data["context"]), children)


def _named_tuple(data: Any, children: list[TreeSpec], decoder: Decoder) -> TreeSpec:
    kind = _registered(pytree.SUPPORTED_SERIALIZED_TYPES, data["class"])
    return TreeSpec(tuple, None, children) if kind is None else TreeSpec(namedtuple, kind, children)


def _class(data: Any, children: list[TreeSpec], decoder: Decoder) -> TreeSpec:
    kind = _registered(pytree.SUPPORTED_NODES, data["class"])
    if kind is not None:
        return TreeSpec(kind, decoder(data["context"]), children)
    if data["fields"] is None:
        return TreeSpec(tuple, None, children)
    return TreeSpec(dict, data["fields"], children)


_NODES: Mapping[str, Callable[[Any, list[TreeSpec], Decoder], TreeSpec]] = {
    **dict.fromkeys(_BUILT_IN, _built_in),
    "named tuple": _named_tuple,
    "class": _class,
}


def _registered(known: Mapping[Any, Any], name: str) -> type | None:
    import_library(name.partition(".")[0])
    return next((kind for kind in known if isinstance(kind, type) and _name(kind) == name), None)


def children_of(spec: TreeSpec) -> list[TreeSpec]:
    """The subtrees of a tree."""
    return list(spec.children())


def encode_interface(interface: Interface) -> dict[str, Any]:
    """How the model is called, with the example inputs."""
    return {
        "names": list(interface.names),
        "inputs": encode_tree(interface.in_spec),
        "outputs": encode_tree(interface.out_spec),
        "examples": [_encode_leaf(leaf) for leaf in interface.leaves],
        "dynamic": [[index, list(dims)] for index, dims in interface.dynamic.items()],
        "batch": [[index, dim] for index, dim in interface.batch.items()],
        "tied": [[list(dim), list(other)] for dim, other in interface.tied.items()],
    }


def decode_interface(data: Any, decoder: Decoder) -> Interface:
    """The interface that :func:`encode_interface` saved."""
    names = tuple(data["names"])
    for name in names:
        if not name.isidentifier():
            raise ValueError(f"{name!r} is no name of an input")
    in_spec = decode_tree(data["inputs"], decoder)
    args, kwargs = tree_unflatten([_decode_leaf(leaf, decoder) for leaf in data["examples"]], in_spec)
    return Interface(
        args,
        kwargs,
        in_spec,
        decode_tree(data["outputs"], decoder),
        names,
        {int(index): tuple(dims) for index, dims in data["dynamic"]},
        {int(index): int(dim) for index, dim in data["batch"]},
        {(int(i), int(j)): (int(k), int(n)) for (i, j), (k, n) in data.get("tied", [])},
    )


def _encode_leaf(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return {"value": encode(leaf)}
    raw = leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return {
        "dtype": str(leaf.dtype).removeprefix("torch."),
        "shape": list(leaf.shape),
        "device": str(leaf.device),
        "base64": base64.b64encode(raw).decode("ascii"),
    }


def _decode_leaf(data: Any, decoder: Decoder) -> Any:
    if "value" in data:
        return decoder(data["value"])
    dtype = decoder({"dtype": data["dtype"]})
    raw = bytearray(base64.b64decode(data["base64"], validate=True))
    return torch.frombuffer(raw, dtype=dtype).reshape(data["shape"]).to(decoder.device(data["device"]))
