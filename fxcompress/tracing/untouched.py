"""The caller's model is never changed: mode, attributes and global switches are put back whatever happens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_TABLES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


@contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """Lends a model in eval mode; restores every module's attributes and mode, also on error or Ctrl-C.

    A forward may leave traces on its modules (cached shapes, tensors of a tracer); each module's attribute table is put
    back as it was. The fused attention fast path is off meanwhile: it hides the operations of ``MultiheadAttention``.
    """
    before = [(module, dict(module.__dict__), _tables(module)) for module in model.modules()]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        model.eval()
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, attributes, tables in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for key, table in tables.items():
                current = module.__dict__[key]
                if current != table if isinstance(table, set) else _differs(current, table):
                    current.clear()
                    current.update(table)


def _tables(module: nn.Module) -> dict[str, Any]:
    return {key: module.__dict__[key].copy() for key in _TABLES}


def _differs(current: dict[str, Any], table: dict[str, Any]) -> bool:
    return len(current) != len(table) or any(current.get(name) is not value for name, value in table.items())


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Runs with a fixed random state and puts the caller's back."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
