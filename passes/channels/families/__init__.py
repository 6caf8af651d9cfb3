"""Dependency rules, one file for each family of operators."""

from __future__ import annotations

import importlib
import pkgutil


def load() -> None:
    """Registers the rules of every family."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
