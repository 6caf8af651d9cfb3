"""Units that an option's number may carry: ``512MB``, ``1.5ms``, ``4GMACs``."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

from fxcompress.errors import InputError

_SI = {"": 0, "K": 3, "M": 6, "G": 9, "T": 12}

DIMENSIONS: Mapping[str, Mapping[str, Fraction]] = {
    "size": {
        **{f"{prefix}B": Fraction(10**power) for prefix, power in _SI.items()},
        **{f"{prefix}iB": Fraction(2 ** (10 * step)) for step, prefix in enumerate("KMGT", start=1)},
    },
    "time": {
        "ns": Fraction(1, 10**9),
        "us": Fraction(1, 10**6),
        "ms": Fraction(1, 10**3),
        "s": Fraction(1),
        "min": Fraction(60),
        "h": Fraction(3600),
    },
    "work": {f"{prefix}MACs": Fraction(10**power) for prefix, power in _SI.items()},
}
"""Dimension -> unit -> how many base units (byte, second, MAC) it is; ``MB`` is 10^6 bytes, ``MiB`` is 2^20."""


def units_like(unit: str) -> Mapping[str, Fraction]:
    """The units that convert to ``unit``, itself included.

    Raises:
        InputError: If ``unit`` is in no dimension.
    """
    for units in DIMENSIONS.values():
        if unit in units:
            return units
    known = ", ".join(name for units in DIMENSIONS.values() for name in units)
    raise InputError(f"{unit!r} is not a unit that options can be in; known units: {known}")
