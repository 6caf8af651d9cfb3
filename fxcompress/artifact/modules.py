"""The modules of a Program as data: standard layers with their constructor arguments, and where every tensor sits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxcompress.artifact.values import Decoder, encode
from fxcompress.errors import ArtifactError
from fxcompress.ir.layers import LAYERS, layer_of
from fxcompress.ir.ops import set_module, set_state

CONTAINER = "container"
_CLASSES = {layer.module.__name__: layer.module for layer in LAYERS}
_PLACEMENT = ("self", "device", "dtype")


@dataclass(frozen=True)
class State:
    """One name of one tensor.

    Attributes:
        name: Qualified name.
        tensor: The tensor.
        persistent: Whether it is part of ``state_dict()``.
    """

    name: str
    tensor: torch.Tensor
    persistent: bool


def states(root: nn.Module) -> Iterator[State]:
    """Every name of every parameter and buffer, in the order of ``state_dict()``."""
    for path, module in root.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield State(prefix + leaf, tensor, leaf not in module._non_persistent_buffers_set)


def encode_modules(root: fx.GraphModule) -> list[dict[str, Any]]:
    """Every module below the root by path: its class with constructor arguments, or the path of the same object."""
    first: dict[int, str] = {}
    table: list[dict[str, Any]] = []
    for path, module in root.named_modules(remove_duplicate=False):
        if not path:
            continue
        known = first.setdefault(id(module), path)
        table.append(
            {"path": path, "same_as": known} if known != path else {"path": path, **_encode_module(path, module)}
        )
    return table


def _encode_module(path: str, module: nn.Module) -> dict[str, Any]:
    if type(module) is nn.Module:
        return {"class": CONTAINER}
    layer = layer_of(module)
    if layer is None:
        raise ArtifactError(
            f"{path!r} is a {type(module).__name__}, which is no standard layer and cannot be saved as data"
        )
    given = _constructor_arguments(module)
    rebuilt = _build(type(module), given)
    if layer.arguments(rebuilt) != layer.arguments(module):
        raise ArtifactError(f"{path!r} has attributes that its constructor cannot give: {layer.arguments(module)}")
    return {"class": type(module).__name__, "arguments": {name: encode(value) for name, value in given.items()}}


def _constructor_arguments(module: nn.Module) -> dict[str, Any]:
    """What to construct a standard layer with: its attributes carry its constructor's names. Defaults are left out."""
    given = {}
    for name, parameter in inspect.signature(type(module).__init__).parameters.items():
        if name in _PLACEMENT or not hasattr(module, name):
            continue
        value = getattr(module, name)
        if name == "bias":  # a flag in the constructor, the tensor itself (or None) in the module
            value = value is not None
        if value != parameter.default:
            given[name] = value
    return given


def _build(kind: type[nn.Module], given: dict[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return kind(**given).eval()


def encode_state(root: fx.GraphModule) -> list[dict[str, Any]]:
    """Every name of every tensor; names of one tensor share the ``data`` entry, which is the first of them."""
    first: dict[int, str] = {}
    table = []
    for state in states(root):
        tensor = state.tensor
        if tensor.is_meta:
            raise ArtifactError(f"{state.name!r} is on the meta device and has no values: load weights first")
        if type(tensor) not in (nn.Parameter, torch.Tensor) or tensor.layout is not torch.strided:
            raise ArtifactError(
                f"{state.name!r} is a {type(tensor).__name__} ({tensor.layout}), which only a pickle could hold; "
                "replace it with a plain dense tensor"
            )
        table.append(
            {
                "name": state.name,
                "data": first.setdefault(id(tensor), state.name),
                "parameter": isinstance(tensor, nn.Parameter),
                "persistent": state.persistent,
                "requires_grad": tensor.requires_grad,
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "device": str(tensor.device),
            }
        )
    return table


Read = Callable[[str, torch.dtype], torch.Tensor]
"""Gives the values stored for a name, as a CPU tensor of that dtype."""


def decode_modules(modules: list[Any], state: list[Any], read: Read, decoder: Decoder) -> nn.Module:
    """A module tree with the saved layers and tensors, in eval mode."""
    root = nn.Module()
    for entry in modules:
        path = checked_path(entry["path"])
        if "same_as" in entry:
            module = root.get_submodule(entry["same_as"])
        elif entry["class"] == CONTAINER:
            module = nn.Module()
        else:
            given = {name: decoder(value) for name, value in entry["arguments"].items()}
            module = _build(_CLASSES[entry["class"]], given)
        set_module(root, path, module)
    tensors: dict[str, torch.Tensor] = {}
    for entry in state:
        if entry["data"] not in tensors:
            tensors[entry["data"]] = _decode_tensor(entry, read, decoder)
        set_state(root, checked_path(entry["name"]), tensors[entry["data"]], persistent=entry["persistent"])
    left = [held.name for held in states(root) if held.tensor.is_meta]
    if left:
        raise ValueError(f"no values for {left[0]!r}")
    return root.eval()


def _decode_tensor(entry: Any, read: Read, decoder: Decoder) -> torch.Tensor:
    values = read(entry["data"], decoder({"dtype": entry["dtype"]})).to(decoder.device(entry["device"]))
    if entry["parameter"]:
        return nn.Parameter(values, requires_grad=entry["requires_grad"])
    return values.requires_grad_(entry["requires_grad"])


def checked_path(path: str) -> str:
    """A qualified name that is safe to stand, quoted, in the Python code that ``torch.fx`` generates."""
    if not path or any(character in "\"'\\" or not character.isprintable() for character in path):
        raise ValueError(f"{path!r} is no qualified name")
    return path
