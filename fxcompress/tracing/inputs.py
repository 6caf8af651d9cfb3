"""Example inputs: one canonical form, checks that name the offending input, and which dims may change."""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

from fxcompress.errors import InputError
from fxcompress.ir.program import Interface
from fxcompress.tracing.structures import register_dataclasses

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
        tied: ``(leaf index, dim)`` -> the first dynamic dim of the same size, known once the model is captured.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    names: tuple[str, ...]
    spec: TreeSpec
    labels: tuple[str, ...]
    dynamic: dict[int, tuple[int, ...]]
    batch: dict[int, int]
    constrained: bool = False
    tied: Mapping[tuple[int, int], tuple[int, int]] = field(default_factory=dict)

    @property
    def leaves(self) -> list[Any]:
        return tree_flatten((self.args, self.kwargs))[0]

    def fresh(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inputs as tensors of their own, for a model that may write into them."""
        leaves = [leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in self.leaves]
        args, kwargs = tree_unflatten(leaves, self.spec)
        return args, kwargs

    def demanded(self, index: int, dim: int) -> bool:
        """Whether a dim must stay dynamic; else it may become a constant.

        That an input has as many rows as the first one may be an accident, so only the first one's batch is demanded.
        """
        guessed = self.batch.get(index) == dim and index != next(iter(self.batch))
        return not self.constrained and not guessed

    def with_all_dims(self) -> ExampleInputs:
        """The inputs with every dim dynamic, unless the model fixes it."""
        dims = {i: tuple(range(leaf.dim())) for i, leaf in enumerate(self.leaves) if isinstance(leaf, torch.Tensor)}
        return replace(self, dynamic=dims, constrained=True)

    def settled(self, values: list[Any]) -> ExampleInputs:
        """The inputs with only those dims dynamic that are in ``values``, the symbolic inputs of what was captured."""
        dynamic = {
            index: tuple(dim for dim in dims if _may_change(values[index].shape[dim]))
            for index, dims in self.dynamic.items()
        }
        batch = {index: dim for index, dim in self.batch.items() if dim in dynamic.get(index, ())}
        first: dict[Any, tuple[int, int]] = {}
        tied = {
            (index, dim): first.setdefault(values[index].shape[dim].node.expr, (index, dim))
            for index, dims in sorted(dynamic.items())
            for dim in dims
        }
        tied = {dim: other for dim, other in tied.items() if dim != other}
        return replace(self, dynamic={i: dims for i, dims in dynamic.items() if dims}, batch=batch, tied=tied)

    def interface(self, out_spec: TreeSpec) -> Interface:
        """What callers see, once the output structure is known."""
        return Interface(
            self.args, self.kwargs, self.spec, out_spec, self.names, self.dynamic, self.batch, dict(self.tied)
        )


def _may_change(size: int | torch.SymInt) -> bool:
    """Whether a size is still a symbol; what the weights fix is one that stands for a number."""
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None


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
    register_dataclasses((args, kwargs))
    kwargs = _in_signature_order(model, kwargs)
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
        for index in _leaves_of(name, labels, leaves, extra, batch):
            dims[index] = tuple(sorted({*dims.get(index, ()), *(d % leaves[index].dim() for d in extra)}))
    return ExampleInputs(args, kwargs, names, spec, labels, dims, batch)


def flatten_call(interface: Interface, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Leaves of a call in placeholder order.

    Raises:
        InputError: The call's structure, an input that is no tensor, or the dtype or a fixed dim of one that is,
            differs from the traced one.
    """
    leaves = _flat(interface, args, kwargs)
    _check_leaves(interface, leaves)
    return leaves


def flatten_batch(interface: Interface, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Leaves of a call in placeholder order, real numbers in the precision of the traced ones.

    Raises:
        InputError: As for :func:`flatten_call`.
    """
    leaves = [
        given.to(traced.dtype) if _is_real(given) and _is_real(traced) else given
        for given, traced in zip(_flat(interface, args, kwargs), interface.leaves, strict=True)
    ]
    _check_leaves(interface, leaves)
    return leaves


def _is_real(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def _flat(interface: Interface, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
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
            f"the call has the inputs {_pictured(leaves, spec)}, but the model was traced with "
            f"{_pictured(interface.leaves, interface.in_spec)} (inputs: {', '.join(interface.names)}); call it with "
            "that structure or trace it again"
        )
    return leaves


class _Word(str):
    __repr__ = str.__str__


def _pictured(leaves: list[Any], spec: TreeSpec) -> str:
    words = [_Word("tensor" if isinstance(leaf, torch.Tensor) else reprlib.repr(leaf)) for leaf in leaves]
    args, kwargs = tree_unflatten(words, spec)
    return f"(*{args}, **{kwargs})"


def _check_leaves(interface: Interface, leaves: list[Any]) -> None:
    for index, (given, traced) in enumerate(zip(leaves, interface.leaves, strict=True)):
        if isinstance(given, torch.Tensor) and isinstance(traced, torch.Tensor):
            _check_tensor(interface, index, given, traced)
        elif isinstance(traced, torch.Tensor):
            raise InputError(f"input {_name(interface, index)!r} is {_shown(given)}: give a torch.Tensor")
        elif isinstance(given, torch.Tensor) or given != traced:
            raise InputError(
                f"input {_name(interface, index)!r} is {_shown(given)} where the model was traced with "
                f"{_shown(traced)}, and what is no tensor is fixed: call it with that value or trace it again"
            )


def _check_tensor(interface: Interface, index: int, given: torch.Tensor, traced: torch.Tensor) -> None:
    free = interface.dynamic.get(index, ())
    ranks = given.dim() == traced.dim()
    same = ranks and all(dim in free or size == traced.shape[dim] for dim, size in enumerate(given.shape))
    if given.dtype != traced.dtype or not same:
        shape = ", ".join("any" if dim in free else str(size) for dim, size in enumerate(traced.shape))
        raise InputError(
            f"input {_name(interface, index)!r} is {_shown(given)} where the model was traced with {traced.dtype} of "
            f"shape ({shape}): convert it, or trace the model with dynamic= for dims that change"
        )


def _name(interface: Interface, index: int) -> str:
    path, _ = tree_flatten_with_path((interface.args, interface.kwargs))[0][index]
    return _label(path, interface.names, len(interface.args))


def _shown(value: Any) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else reprlib.repr(value)


def _in_signature_order(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword inputs in the order of the signature, in which torch.export looks for their dynamic dims."""
    order = {name: index for index, name in enumerate(inspect.signature(model.forward).parameters)}
    return dict(sorted(kwargs.items(), key=lambda item: order.get(item[0], len(order))))


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
    if not isinstance(batch_dim, int):
        raise InputError(f"batch_dim is {batch_dim!r}: give the number of a dim, or None for a fixed batch")
    least = batch_dim + 1 if batch_dim >= 0 else -batch_dim
    tensors = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
    batched = {i: leaf for i, leaf in tensors.items() if leaf.dim() >= least}
    if not batched:
        ranks = ", ".join(str(leaf.dim()) for leaf in tensors.values())
        if max(leaf.dim() for leaf in tensors.values()) == 0:
            return {}
        raise InputError(
            f"no example input has a dim {batch_dim} (ranks: {ranks}): give another batch_dim, or None for a fixed "
            "batch"
        )
    size = next(iter(batched.values())).shape[batch_dim]
    return {i: batch_dim % leaf.dim() for i, leaf in batched.items() if leaf.shape[batch_dim] == size}


def _leaves_of(
    name: str, labels: tuple[str, ...], leaves: list[Any], dims: Sequence[int], batch: Mapping[int, int]
) -> list[int]:
    found = [i for i, label in enumerate(labels) if label == name or label.startswith((name + "[", name + "."))]
    if not found:
        raise InputError(f"dynamic names the input {name!r}, which does not exist; inputs: {', '.join(labels)}")
    if not isinstance(dims, Sequence) or not all(isinstance(dim, int) for dim in dims):
        raise InputError(
            f"dynamic gives {dims!r} for input {name!r}: give a tuple of dims, for example {{{name!r}: (1,)}}"
        )
    for index in found:
        leaf = leaves[index]
        rank = leaf.dim() if isinstance(leaf, torch.Tensor) else 0
        for dim in dims:
            if not -rank <= dim < rank:
                raise InputError(f"dynamic names dim {dim} of input {name!r}, which has {rank} dims")
            if leaf.shape[dim] == 1 and batch.get(index) != dim % rank:
                raise InputError(
                    f"dynamic names dim {dim} of input {name!r}, but it has size 1 in the example, which models treat "
                    "as a constant: give an example with 2 or more there"
                )
    return found
