"""Parameters of tests that need an engine, skipped where its packages are not installed."""

import importlib.util

import pytest

from fxcompress.engines.formats import FORMATS


def needs(value, *packages):
    """A parameter that is skipped unless packages are installed."""
    lacking = [package for package in packages if importlib.util.find_spec(package) is None]
    return pytest.param(value, id=str(value), marks=pytest.mark.skipif(bool(lacking), reason=f"needs {lacking}"))


SUFFIXES = [needs(suffix, *entry.packages) for suffix, entry in FORMATS.items()]
