"""Example inputs: one canonical form, checks that name the offending input, and which dims may change."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

from fxcompress.errors import InputError
from fxcompress.ir.program import Interface

Dynamic = Mapping[str, Sequence[int]]
"""Input name -> dims, beside the batch dim, whose size may change from call to call."""


@dataclass(frozen=True)
class ExampleInputs:
    """Example inputs in canonical form.

    Attributes:
        args: Positional inputs.
        kwargs: Keyword inputs.
        names: Parameter names of the top-level inputs, positional first.
        spec: Tree of ``(args, kwargs)``.
        labels: A readable name of every leaf.
        dynamic: Leaf index -> dims that may change.
        batch: Leaf index -> batch dim.
        constrained: Whether dims in ``dynamic`` become constants where the model needs that; otherwise it is an error.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    names: tuple[str, ...]
    spec: TreeSpec
    labels: tuple[str, ...]
    dynamic: dict[int, tuple[int, ...]]
    batch: dict[int, int]
    constrained: bool = False

    @property
    def leaves(self) -> list[Any]:
        return tree_flatten((self.args, self.kwargs))[0]

    def fresh(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inputs as tensors of their own, for a model that may write into them."""
        leaves = [leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in self.leaves]
        args, kwargs = tree_unflatten(leaves, self.spec)
        return args, kwargs

    def interface(self, out_spec: TreeSpec) -> Interface:
        """What callers see, once the output structure is known."""
        return Interface(self.args, self.kwargs, self.spec, out_spec, self.names, self.dynamic, self.batch)


def split_call(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``(args, kwargs)`` of a tensor, a tuple of positionals, a dict of keywords, or an ``(args, kwargs)`` pair."""
    if isinstance(example_inputs, dict):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        if (
            len(example_inputs) == 2
            and isinstance(example_inputs[0], (tuple, list))
            and isinstance(example_inputs[1], dict)
            and all(isinstance(key, str) for key in example_inputs[1])
        ):
            return tuple(example_inputs[0]), dict(example_inputs[1])
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def prepare(
    model: nn.Module, example_inputs: Any, dynamic: Dynamic | None = None, batch_dim: int | None = 0
) -> ExampleInputs:
    """Canonical example inputs for a model.

    Raises:
        InputError: The inputs do not fit the signature, are empty, hold NaN or Inf, sit on another device than the
            model, or ``dynamic`` names an input or dim that does not exist.
    """
    args, kwargs = split_call(example_inputs)
    names = _top_level_names(model, args, kwargs)
    with_paths, spec = tree_flatten_with_path((args, kwargs))
    labels = tuple(_label(path, names, len(args)) for path, _ in with_paths)
    leaves = [leaf for _, leaf in with_paths]
    if not any(isinstance(leaf, torch.Tensor) for leaf in leaves):
        raise InputError("example_inputs hold no tensor: pass at least one, for example torch.randn(2, 3, 224, 224)")
    for label, leaf in zip(labels, leaves, strict=True):
        if isinstance(leaf, torch.Tensor):
            _check_leaf(label, leaf)
    _check_devices(model, labels, leaves)
    batch = _batch_dims(leaves, batch_dim)
    dims: dict[int, tuple[int, ...]] = {index: (dim,) for index, dim in batch.items()}
    for name, extra in (dynamic or {}).items():
        for index in _leaves_of(name, labels, leaves, extra):
            dims[index] = tuple(sorted({*dims.get(index, ()), *(d % leaves[index].dim() for d in extra)}))
    return ExampleInputs(args, kwargs, names, spec, labels, dims, batch)


def flatten_call(interface: Interface, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Leaves of a call in placeholder order.

    Raises:
        InputError: The call's structure, a dtype or a fixed size differs from the traced one.
    """
    leaves, spec = tree_flatten((args, kwargs))
    if spec != interface.in_spec and len(args) <= len(interface.names):
        by_name = dict(zip(interface.names, args, strict=False)) | kwargs
        if set(by_name) == set(interface.names):
            count = len(interface.args)
            ordered = [by_name[name] for name in interface.names]
            leaves, spec = tree_flatten(
                (tuple(ordered[:count]), dict(zip(interface.names[count:], ordered[count:], strict=True)))
            )
    if spec != interface.in_spec:
        raise InputError(
            f"the call has structure {spec}, but the model was traced with {interface.in_spec} "
            f"(inputs: {', '.join(interface.names)}); call it with that structure or trace it again"
        )
    return leaves


def _top_level_names(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...]:
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"example_inputs do not fit {type(model).__name__}.forward{signature}: {error}. Pass a tensor, a tuple of "
            "positional inputs, a dict of keyword inputs, or a pair (args, kwargs)"
        ) from None
    names: list[str] = []
    for name, parameter in signature.parameters.items():
        if name not in bound.arguments or parameter.kind is parameter.VAR_KEYWORD:
            continue
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{name}_{i}" for i in range(len(bound.arguments[name]))]
        elif name not in kwargs:
            names.append(name)
    return (*names[: len(args)], *kwargs)


def _label(path: tuple[Any, ...], names: tuple[str, ...], positional: int) -> str:
    side, key = path[0].idx, path[1]
    top = names[key.idx] if side == 0 else str(key.key)
    return top + keystr(path[2:])


def _check_leaf(label: str, leaf: torch.Tensor) -> None:
    if leaf.numel() == 0:
        raise InputError(
            f"example input {label!r} is empty (shape {tuple(leaf.shape)}): pass at least one row, two are best"
        )
    if not leaf.is_meta and leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()):
        if leaf.dim() >= 1 and bool(torch.isinf(leaf).any()) and not bool(torch.isnan(leaf).any()):
            return  # additive attention masks carry -inf on purpose; a NaN never is
        raise InputError(f"example input {label!r} holds NaN: pass finite values, so that outputs can be compared")


def _check_devices(model: nn.Module, labels: tuple[str, ...], leaves: list[Any]) -> None:
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) != 1:
        return
    (device,) = devices
    for label, leaf in zip(labels, leaves, strict=True):
        if isinstance(leaf, torch.Tensor) and leaf.device.type != device.type:
            raise InputError(
                f"example input {label!r} is on {leaf.device}, but the model is on {device}: "
                f"move one of them, for example {label}.to({str(device)!r})"
            )


def _batch_dims(leaves: list[Any], batch_dim: int | None) -> dict[int, int]:
    if batch_dim is None:
        return {}
    tensors = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.dim() > batch_dim}
    if not tensors:
        return {}
    size = next(iter(tensors.values())).shape[batch_dim]
    return {i: batch_dim for i, leaf in tensors.items() if leaf.shape[batch_dim] == size}


def _leaves_of(name: str, labels: tuple[str, ...], leaves: list[Any], dims: Sequence[int]) -> list[int]:
    found = [i for i, label in enumerate(labels) if label == name or label.startswith((name + "[", name + "."))]
    if not found:
        raise InputError(f"dynamic names the input {name!r}, which does not exist; inputs: {', '.join(labels)}")
    for index in found:
        leaf = leaves[index]
        rank = leaf.dim() if isinstance(leaf, torch.Tensor) else 0
        for dim in dims:
            if not -rank <= dim < rank:
                raise InputError(f"dynamic names dim {dim} of input {name!r}, which has {rank} dims")
    return found
