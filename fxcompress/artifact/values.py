"""JSON forms of what stands in a graph: numbers, names, dtypes, nodes, and the operators that are called.

Everything here is a table from a type or a tag to a function; a name in a file selects a row, and is never imported or
run.
"""

from __future__ import annotations

import importlib
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx.immutable_collections import immutable_dict, immutable_list

from fxcompress.errors import ArtifactError

LIBRARIES: Mapping[str, str] = {
    "quantized_decomposed": "torch.ao.quantization.fx._decomposed",
    "torchvision": "torchvision",
    "transformers": "transformers.modeling_outputs",
}
"""Operator namespace or package -> the module whose import registers its operators or output classes."""

_SIZE_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    **{
        f"operator.{name}": getattr(operator, name)
        for name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pos", "pow", "abs", "getitem")
    },
    **{
        f"operator.{name}": getattr(operator, name)
        for name in ("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_")
    },
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc", "sqrt", "log2", "gcd")},
    **{f"torch.{name}": getattr(torch, name) for name in dir(torch) if name.startswith("sym_")},
    **{f"builtins.{function.__name__}": function for function in (max, min, abs, round, int, float, bool)},
}
"""What a Program may call beside operators: arithmetic on sizes, and taking one of several results."""

_SIZE_FUNCTION_NAMES = {function: name for name, function in _SIZE_FUNCTIONS.items()}


def import_library(name: str) -> None:
    """Imports the package that registers operators or classes of that name, if we know it and it is installed."""
    if name in LIBRARIES:
        try:
            importlib.import_module(LIBRARIES[name])
        except ImportError:
            return  # the caller then finds nothing registered and says so


def encode_target(target: Any) -> str:
    """The name of an operator overload (``aten.add.Tensor``) or of a size function (``operator.mul``)."""
    if isinstance(target, OpOverload):
        return f"{target}"
    if target in _SIZE_FUNCTION_NAMES:
        return _SIZE_FUNCTION_NAMES[target]
    raise ArtifactError(f"the graph calls {target!r}, which is no operator overload and cannot be saved")


def decode_target(name: str) -> Any:
    """What :func:`encode_target` named."""
    if name in _SIZE_FUNCTIONS:
        return _SIZE_FUNCTIONS[name]
    namespace, _, rest = name.partition(".")
    packet_name, _, overload_name = rest.partition(".")
    found = _overload(namespace, packet_name, overload_name)
    if found is None:
        import_library(namespace)
        found = _overload(namespace, packet_name, overload_name)
    if found is None:
        raise ArtifactError(
            f"it uses the operator {name!r}, which is not registered here; import the package that "
            "defines it, or upgrade torch"
        )
    return found


def _overload(namespace: str, packet_name: str, overload_name: str) -> OpOverload | None:
    packet = getattr(getattr(torch.ops, namespace, None), packet_name, None)
    found = getattr(packet, overload_name, None) if isinstance(packet, OpOverloadPacket) else None
    return found if isinstance(found, OpOverload) else None


def _plain(value: Any) -> Any:
    return value


def _float(value: float) -> Any:
    return value if math.isfinite(value) else {"float": str(value)}


def _list(value: Any) -> list[Any]:
    return [encode(item) for item in value]


def _tuple(value: Any) -> dict[str, Any]:
    return {"tuple": _list(value)}


def _dict(value: Any) -> dict[str, Any]:
    return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}


_ENCODERS: Mapping[type, Callable[[Any], Any]] = {
    type(None): _plain,
    bool: _plain,
    int: _plain,
    str: _plain,
    float: _float,
    complex: lambda value: {"complex": [_float(value.real), _float(value.imag)]},
    list: _list,
    immutable_list: _list,
    tuple: _tuple,
    torch.Size: _tuple,
    dict: _dict,
    immutable_dict: _dict,
    slice: lambda value: {"slice": _list((value.start, value.stop, value.step))},
    fx.Node: lambda value: {"node": value.name},
    torch.dtype: lambda value: {"dtype": str(value).removeprefix("torch.")},
    torch.device: lambda value: {"device": str(value)},
    torch.layout: lambda value: {"layout": str(value).removeprefix("torch.")},
    torch.memory_format: lambda value: {"memory_format": str(value).removeprefix("torch.")},
}


def encode(value: Any) -> Any:
    """A literal of a graph, or of a tree's context, as JSON data."""
    encoder = _ENCODERS.get(type(value))
    if encoder is None:
        raise ArtifactError(f"{value!r} ({type(value).__name__}) cannot be saved as data")
    return encoder(value)


class Decoder:
    """Turns JSON data back into values.

    Args:
        device: Where everything goes; ``None`` for the device it was saved from.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.nodes: dict[str, fx.Node] = {}
        self._device = device
        self._tags: Mapping[str, Callable[[Any], Any]] = {
            "float": float,
            "complex": lambda parts: complex(*map(self, parts)),
            "tuple": lambda items: tuple(map(self, items)),
            "dict": lambda items: {self(key): self(item) for key, item in items},
            "slice": lambda parts: slice(*map(self, parts)),
            "node": self.nodes.__getitem__,
            "dtype": lambda name: _torch_constant(name, torch.dtype),
            "device": self.device,
            "layout": lambda name: _torch_constant(name, torch.layout),
            "memory_format": lambda name: _torch_constant(name, torch.memory_format),
        }

    def __call__(self, data: Any) -> Any:
        if isinstance(data, list):
            return [self(item) for item in data]
        if isinstance(data, dict):
            ((tag, content),) = data.items()
            return self._tags[tag](content)
        return data

    def device(self, name: str) -> torch.device:
        """A device by name, or the one everything goes to.

        Raises:
            ArtifactError: This machine has no such device.
        """
        device = self._device or torch.device(name)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ArtifactError(
                f"it was saved from {device}, which this machine does not have; load it with device='cpu'"
            )
        return device


def _torch_constant(name: str, kind: type) -> Any:
    value = getattr(torch, name)
    if not isinstance(value, kind):
        raise ValueError(f"torch.{name} is no {kind.__name__}")
    return value
