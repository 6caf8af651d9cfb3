"""Whether the packages that an engine needs are installed, and new enough."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from collections.abc import Mapping

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from fxcompress.errors import MissingExtraError


def require(package: str, extra: str, purpose: str) -> None:
    """Raises :class:`MissingExtraError` unless a package is installed in a version that the extra asks for.

    Args:
        package: By import name.
        extra: The extra that installs it.
        purpose: What needs it, as the start of a sentence.
    """
    if importlib.util.find_spec(package) is None:
        raise MissingExtraError(package, extra, purpose)
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return  # of a distribution with another name, such as onnxruntime-gpu
    wanted = _versions(extra).get(package)
    if wanted is not None and not wanted.contains(found, prereleases=True):
        raise MissingExtraError(package, extra, purpose, f" in a version {wanted}, and {found} is installed")


@functools.lru_cache
def _versions(extra: str) -> Mapping[str, SpecifierSet]:
    """Package -> the versions that an extra asks for."""
    try:
        lines = importlib.metadata.requires("fxcompress") or []
    except importlib.metadata.PackageNotFoundError:
        return {}  # run from a checkout that is not installed
    requirements = [Requirement(line) for line in lines]
    return {
        each.name: each.specifier
        for each in requirements
        if each.marker is not None and each.marker.evaluate({"extra": extra})
    }
