"""Whether two values of an analysis are the same, whatever dataclasses, arrays and mappings they are made of."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def same(a: Any, b: Any) -> bool:
    """Whether two values have the same type and the same contents; NaN is the same as NaN."""
    if type(a) is not type(b):
        return False
    if dataclasses.is_dataclass(a):
        return all(same(getattr(a, field.name), getattr(b, field.name)) for field in dataclasses.fields(a))
    return _same(a, b)


@functools.singledispatch
def _same(a: Any, b: Any) -> bool:
    return bool(a == b)


@_same.register
def _(a: float, b: float) -> bool:
    return a == b or (a != a and b != b)


@_same.register
def _(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype or a.is_meta != b.is_meta:
        return False
    return a.is_meta or bool(((a == b) | ((a != a) & (b != b))).all())


@_same.register
def _(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind in "fc")


@_same.register(list)
@_same.register(tuple)
def _(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(map(same, a, b))


@_same.register
def _(a: Mapping, b: Mapping) -> bool:  # type: ignore[type-arg]
    return list(a) == list(b) and all(same(value, b[key]) for key, value in a.items())
