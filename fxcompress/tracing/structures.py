"""Structures of the caller's own classes."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.utils._pytree import tree_leaves


def register_dataclasses(tree: Any) -> None:
    """Makes the dataclasses in a structure known to PyTorch, which takes them apart from then on.

    The same as calling ``torch.export.register_dataclass`` on each by hand. One that cannot be built from its fields
    alone is left as it is.
    """
    while kinds := {type(leaf) for leaf in tree_leaves(tree) if _can_be_rebuilt(leaf)}:
        for kind in kinds:
            torch.export.register_dataclass(kind)


def _can_be_rebuilt(value: Any) -> bool:
    return (
        dataclasses.is_dataclass(value)
        and not isinstance(value, type)
        and all(field.init for field in dataclasses.fields(value))
    )
