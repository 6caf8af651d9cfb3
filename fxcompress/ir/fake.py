"""Fake tensors: the shapes of a Program's values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor


def resized(value: torch.Tensor, shape: Sequence[Any]) -> torch.Tensor:
    """A fake tensor like another, but contiguous and of another shape.

    It is put together by hand: ``new_empty`` dispatches through every mode, which takes twenty times as long.
    """
    if not isinstance(value, FakeTensor):
        return value.new_empty(shape)
    return FakeTensor(value.fake_mode, torch.empty(shape, dtype=value.dtype, device="meta"), value.device)


def symbolic(size: Any) -> Any:
    """A size as something that can be compared and hashed without a guard: a number or an expression."""
    return size.node.expr if isinstance(size, torch.SymInt) else size
