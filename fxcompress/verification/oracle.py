"""The removal oracle: what a Program must compute once some of its elements are gone.

It runs the Program as it was before removal. After each node it sets the removed elements to zero, and it computes what
normalises or compares over removed elements (means, variances, softmax, maxima) over those that are kept. It slices no
parameter and rewrites no shape, so it shares no bug with removal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from fxcompress.errors import VerificationError
from fxcompress.ir.ops import Operation, operation
from fxcompress.ir.program import Program
from fxcompress.tracing.untouched import seeded
from fxcompress.verification.numerics import EXACT_TOLERANCE, Comparison, compare_outputs, input_sets, run, worst
from fxcompress.verification.widened import widened

aten = torch.ops.aten

Keep = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class KeptFactor:
    """A factor of a dim, outermost first.

    Attributes:
        size: Number of elements; ``None`` for one of unknown length, of which a dim has at most one.
        keep: Which of them are kept; ``None`` for all.
    """

    size: int | None
    keep: Keep | None = None


KeptDim = tuple[KeptFactor, ...]
KeptShape = tuple[KeptDim, ...]
Kept = Mapping[str, "KeptShape | list[KeptShape]"]
"""Node name -> what is kept of each dim of its value, for those of which something is removed."""


def check_removal(before: Program, after: Program, kept: Kept) -> Comparison:
    """Compares a Program after removal with the masked one before, in float64, at two batch sizes.

    Args:
        before: The Program before removal.
        after: The Program after it.
        kept: What is kept of each node's value before.

    Raises:
        VerificationError: The outputs differ by more than float64 rounding.
    """
    reference, slim = widened(before), widened(after)
    found = []
    for leaves in input_sets(reference.interface):
        with torch.no_grad(), seeded():
            expected = list(Oracle(reference, kept).run(*leaves))
        found.append(compare_outputs(expected, run(slim, leaves)))
    comparison = worst(found)
    if not comparison.max_rel_error <= EXACT_TOLERANCE:
        raise VerificationError(
            f"removal must leave what the masked model computes, but the output differs by "
            f"{comparison.max_rel_error:.2e} of its largest value (allowed: {EXACT_TOLERANCE:.0e})"
        )
    return comparison


class Oracle(fx.Interpreter):
    """Interprets a Program with some elements masked.

    Args:
        program: The Program before removal.
        kept: What is kept of each node's value.
    """

    def __init__(self, program: Program, kept: Kept) -> None:
        super().__init__(program.graph_module)
        self._root = program.graph_module
        self._kept = kept

    def run_node(self, n: fx.Node) -> Any:
        call = operation(self._root, n)
        rule = _KEPT_ONLY.get(call.overload) if call is not None else None
        masked = rule(_Masked(self, call)) if rule is not None and call is not None else None
        value = super().run_node(n) if masked is None else masked
        kept = self._kept.get(n.name)
        if isinstance(kept, list):
            return type(value)(_zeroed(item, each) for item, each in zip(value, kept, strict=True))
        return value if kept is None else _zeroed(value, kept)

    def value(self, node: fx.Node) -> Any:
        """What a node computed."""
        return self.env[node]

    def keeps(self, node: fx.Node, value: torch.Tensor) -> dict[int, torch.Tensor]:
        """Dim -> which of its elements are kept, for the dims of a node's value of which some are not."""
        kept = self._kept.get(node.name)
        return {} if kept is None or isinstance(kept, list) else _dim_masks(value, kept)


def _dim_masks(value: torch.Tensor, kept: KeptShape) -> dict[int, torch.Tensor]:
    found = {}
    for dim, factors in enumerate(kept):
        if any(factor.keep is not None for factor in factors):
            found[dim] = torch.from_numpy(_flat(factors, value.shape[dim])).to(value.device)
    return found


def _flat(factors: KeptDim, length: int) -> Keep:
    unknown = length // math.prod(factor.size for factor in factors if factor.size is not None)
    flat = np.ones(1, np.bool_)
    for factor in factors:
        size = unknown if factor.size is None else factor.size
        own = np.ones(size, np.bool_) if factor.keep is None else factor.keep
        flat = (flat[:, None] & own[None, :]).reshape(-1)
    return flat


def _spread(mask: torch.Tensor, dim: int, rank: int) -> torch.Tensor:
    return mask.reshape([-1 if index == dim else 1 for index in range(rank)])


def _zeroed(value: Any, kept: KeptShape) -> Any:
    for dim, mask in _dim_masks(value, kept).items():
        value = torch.where(_spread(mask, dim, value.dim()), value, torch.zeros((), dtype=value.dtype))
    return value


class _Masked:
    """A call whose operand is masked, for the rules of operators that look at all elements of a dim."""

    def __init__(self, oracle: Oracle, call: Operation) -> None:
        self.call = call
        first = call.node.args[0]
        assert isinstance(first, fx.Node)
        self.x: torch.Tensor = oracle.value(first)
        self.keeps = oracle.keeps(first, self.x)
        self.oracle = oracle

    def dims(self) -> list[int]:
        """The dims that the call reduces."""
        given = self.call.arguments.get("dim")
        if given is None or given == []:
            return list(range(self.x.dim()))
        listed = given if isinstance(given, (list, tuple)) else [given]
        return [dim % self.x.dim() for dim in listed]

    def mask(self, dims: Sequence[int]) -> torch.Tensor | None:
        """Which elements are kept along some dims, to broadcast against the operand; ``None`` if all are."""
        mask: torch.Tensor | None = None
        for dim in dims:
            if dim in self.keeps:
                own = _spread(self.keeps[dim], dim, self.x.dim())
                mask = own if mask is None else mask & own
        return mask

    def count(self, dims: Sequence[int]) -> int:
        """How many elements are kept along some dims."""
        return math.prod(int(self.keeps[dim].sum()) if dim in self.keeps else self.x.shape[dim] for dim in dims)

    def filled(self, value: float, dims: Sequence[int]) -> torch.Tensor | None:
        """The operand with a value in place of what is removed; ``None`` if nothing is."""
        mask = self.mask(dims)
        return None if mask is None else torch.where(mask, self.x, torch.full((), value, dtype=self.x.dtype))

    def again(self, x: torch.Tensor) -> Any:
        """The call on another operand."""
        args = [x, *self.call.node.args[1:]]
        return self.call.overload(*args, **self.call.node.kwargs)


_Rule = Callable[[_Masked], Any]
_KEPT_ONLY: dict[Any, _Rule] = {}


def _rule(*overloads: Any) -> Callable[[_Rule], _Rule]:
    def register(function: _Rule) -> _Rule:
        _KEPT_ONLY.update(dict.fromkeys(overloads, function))
        return function

    return register


def _moments(x: torch.Tensor, mask: torch.Tensor, dims: Sequence[int], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and centred values over what is kept."""
    mean = torch.where(mask, x, 0).sum(list(dims), keepdim=True) / count
    return mean, torch.where(mask, x - mean, 0)


@_rule(aten.mean.default, aten.mean.dim)
def _mean(masked: _Masked) -> Any:
    dims = masked.dims()
    if masked.mask(dims) is None:
        return None
    keepdim = bool(masked.call.arguments.get("keepdim", False))
    return masked.x.sum(dims, keepdim=keepdim) / masked.count(dims)


@_rule(aten.var.correction, aten.std.correction, aten.var.dim, aten.std.dim, aten.var.default, aten.std.default,
       aten.var_mean.correction, aten.var_mean.dim, aten.std_mean.correction, aten.std_mean.dim)  # fmt: skip
def _variance(masked: _Masked) -> Any:
    dims = masked.dims()
    mask = masked.mask(dims)
    if mask is None:
        return None
    arguments = masked.call.arguments
    correction = arguments.get("correction", float(bool(arguments.get("unbiased", True))))
    count = masked.count(dims)
    mean, centred = _moments(masked.x, mask, dims, count)
    variance = centred.square().sum(dims, keepdim=True) / (count - (1 if correction is None else correction))
    if not arguments.get("keepdim", False):
        mean, variance = mean.squeeze(dims), variance.squeeze(dims)
    name = masked.call.overload._schema.name.rpartition("::")[2]
    spread = variance.sqrt() if name.startswith("std") else variance
    return (spread, mean) if name.endswith("mean") else spread


def _affine(masked: _Masked, x: torch.Tensor, shape: list[int]) -> torch.Tensor:
    weight, bias = (masked.call.arguments.get(name) for name in ("weight", "bias"))
    if weight is not None:
        x = x * _tensor(masked, weight).reshape(shape)
    return x if bias is None else x + _tensor(masked, bias).reshape(shape)


def _tensor(masked: _Masked, value: Any) -> torch.Tensor:
    found: torch.Tensor = masked.oracle.value(value) if isinstance(value, fx.Node) else value
    return found


@_rule(aten.layer_norm.default)
def _layer_norm(masked: _Masked) -> Any:
    shape = list(masked.call["normalized_shape"])
    dims = list(range(masked.x.dim() - len(shape), masked.x.dim()))
    mask = masked.mask(dims)
    if mask is None:
        return None
    count = masked.count(dims)
    _, centred = _moments(masked.x, mask, dims, count)
    variance = centred.square().sum(dims, keepdim=True) / count
    return _affine(masked, centred / torch.sqrt(variance + masked.call["eps"]), shape)


@_rule(aten.rms_norm.default)
def _rms_norm(masked: _Masked) -> Any:
    shape = list(masked.call["normalized_shape"])
    dims = list(range(masked.x.dim() - len(shape), masked.x.dim()))
    if masked.mask(dims) is None:
        return None
    eps = masked.call["eps"]
    eps = torch.finfo(masked.x.dtype).eps if eps is None else eps
    square = masked.x.square().sum(dims, keepdim=True) / masked.count(dims)
    return _affine(masked, masked.x / torch.sqrt(square + eps), shape)


@_rule(aten.group_norm.default)
def _group_norm(masked: _Masked) -> Any:
    if 1 not in masked.keeps:
        return None
    x, groups = masked.x, masked.call["num_groups"]
    keep = masked.keeps[1].reshape(groups, -1)
    grouped = x.reshape(x.shape[0], groups, keep.shape[1], -1)
    mask = keep[None, :, :, None]
    count = (keep.sum(1) * grouped.shape[-1]).clamp(min=1)[None, :, None, None]
    mean = torch.where(mask, grouped, 0).sum((2, 3), keepdim=True) / count
    centred = torch.where(mask, grouped - mean, 0)
    variance = centred.square().sum((2, 3), keepdim=True) / count
    normal = (centred / torch.sqrt(variance + masked.call["eps"])).reshape(x.shape)
    return _affine(masked, normal, [-1] + [1] * (x.dim() - 2))


@_rule(aten.batch_norm.default)
def _batch_norm(masked: _Masked) -> Any:
    """Statistics of the operand itself (standardised weights) are taken over what is kept."""
    dims = [dim for dim in range(masked.x.dim()) if dim != 1]
    mask = masked.mask(dims)
    if mask is None or not masked.call["training"]:
        return None
    count = masked.count(dims)
    _, centred = _moments(masked.x, mask, dims, count)
    variance = centred.square().sum(dims, keepdim=True) / count
    normal = centred / torch.sqrt(variance + masked.call["eps"])
    return _affine(masked, normal, [-1] + [1] * (masked.x.dim() - 2))


def _refill(value: float, *overloads: Any) -> None:
    """Operators for which a removed element may be replaced by a value that does not count."""

    def rule(masked: _Masked) -> Any:
        filled = masked.filled(value, masked.dims())
        return None if filled is None else masked.again(filled)

    _rule(*overloads)(rule)


_refill(-math.inf, aten.softmax.int, aten._softmax.default, aten._safe_softmax.default, aten.log_softmax.int,
        aten._log_softmax.default, aten.logsumexp.default, aten.amax.default, aten.max.default,
        aten.max.dim)  # fmt: skip
_refill(math.inf, aten.amin.default, aten.min.default, aten.min.dim)
_refill(1, aten.prod.default, aten.prod.dim_int, aten.all.default, aten.all.dim, aten.all.dims)
_refill(math.nan, aten.nanmean.default)


@_rule(aten.aminmax.default)
def _least_and_largest(masked: _Masked) -> Any:
    low, high = (masked.filled(value, masked.dims()) for value in (math.inf, -math.inf))
    return None if low is None or high is None else (masked.again(low)[0], masked.again(high)[1])


@_rule(aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim, aten.norm.Scalar, aten.linalg_norm.default)
def _norm(masked: _Masked) -> Any:
    """Zeros do not count, but in norms of negative order."""
    order = masked.call.arguments.get("ord", masked.call.arguments.get("p"))
    filled = masked.filled(math.inf, masked.dims()) if order is not None and order < 0 else None
    return None if filled is None else masked.again(filled)


@_rule(aten.rand_like.default, aten.randn_like.default, aten.bernoulli.default, aten.bernoulli.p)
def _drawn(masked: _Masked) -> Any:
    """Only what is kept gets random numbers, as many as the smaller model draws."""
    if not masked.keeps:
        return None
    kept = masked.x
    for dim, keep in masked.keeps.items():
        kept = kept.index_select(dim, keep.nonzero()[:, 0])
    drawn = masked.again(kept)
    mask = masked.mask(list(masked.keeps))
    assert mask is not None
    return drawn.new_zeros(masked.x.shape).masked_scatter(mask, drawn)


@_rule(aten.scaled_dot_product_attention.default)
def _attention(masked: _Masked) -> Any:
    """Removed source positions get no weight."""
    key = masked.call["key"]
    keeps = masked.oracle.keeps(key, masked.oracle.value(key))
    source = masked.oracle.value(key).dim() - 2
    if source not in keeps:
        return None
    arguments = {
        name: masked.oracle.value(value) if isinstance(value, fx.Node) else value
        for name, value in masked.call.arguments.items()
    }
    hidden = torch.zeros(keeps[source].shape, dtype=masked.x.dtype).masked_fill(~keeps[source], -math.inf)
    given = arguments["attn_mask"]
    if given is not None and given.dtype is torch.bool:
        given = torch.zeros(given.shape, dtype=masked.x.dtype).masked_fill(~given, -math.inf)
    hidden = hidden.expand(masked.x.shape[-2], -1)
    arguments["attn_mask"] = hidden if given is None else given + hidden
    return aten.scaled_dot_product_attention.default(**arguments)
