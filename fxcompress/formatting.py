"""Numbers as people read them: ``25.557 M``, ``97.5 MiB``, ``1.23 ms``, ``-43.1 %``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Scale:
    """Units of one quantity.

    Attributes:
        base: How many of one unit are one of the next.
        units: The units, smallest first.
        decimals: Decimals of a number that is not in the smallest unit.
    """

    base: int
    units: tuple[str, ...]
    decimals: int

    def text(self, value: float) -> str:
        """``value`` in the largest unit that leaves at least 1 before the point."""
        if value < self.base:
            return f"{value:.0f} {self.units[0]}".rstrip()
        power = 1
        # Decided on the rounded number, so that 999,999 is 1.00 M and never 1000.00 k.
        while power < len(self.units) - 1 and round(value / self.base**power, self.decimals) >= self.base:
            power += 1
        return f"{value / self.base**power:.{self.decimals}f} {self.units[power]}"

    def ticks(self, top: float, count: int) -> list[tuple[float, str]]:
        """About ``count`` round values up to ``top``, each with its text."""
        power = 0
        while power < len(self.units) - 1 and top >= self.base ** (power + 1):
            power += 1
        unit = self.base**power
        magnitude = 10.0 ** math.floor(math.log10(top / unit / count))
        step = next(magnitude * nice for nice in (1, 2, 2.5, 5, 10) if count * magnitude * nice >= 0.8 * top / unit)
        steps = range(1, math.floor(top / unit / step + 1e-9) + 1)
        return [(index * step * unit, f"{index * step:g} {self.units[power]}".rstrip()) for index in steps]


PARAMS = Scale(1000, ("", "k", "M", "G", "T", "P"), 3)
MACS = Scale(1000, ("", "k", "M", "G", "T", "P"), 2)
BYTES = Scale(1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"), 1)


def seconds(value: float) -> str:
    """A duration given in seconds: ``38 ms``, ``1.24 s``."""
    return f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.2f} s"


def relative_change(before: float, after: float) -> str:
    """The change in percent of ``before``: ``-43.1 %``; ``new`` where there was nothing before."""
    if before == 0:
        return "0.0 %" if after == 0 else "new"
    return _signed(100 * (after - before) / abs(before), 1) + " %"


def _signed(value: float, decimals: int) -> str:
    rounded = round(value, decimals)
    return f"{rounded:+.{decimals}f}" if rounded else f"{0:.{decimals}f}"


class Unit(NamedTuple):
    """How values of one unit, and the change between two of them, are written."""

    value: Callable[[float], str]
    change: Callable[[float, float], str]


UNITS: Mapping[str, Unit] = {
    "params": Unit(PARAMS.text, relative_change),
    "MACs": Unit(MACS.text, relative_change),
    "B": Unit(BYTES.text, relative_change),
    "ms": Unit(lambda value: f"{value:.3g} ms" if value < 100 else f"{value:.0f} ms", relative_change),
    # A metric is compared by difference: 98 % after 99 % is one point less, not 1.01 % less.
    "%": Unit(lambda value: f"{value:.2f} %", lambda before, after: f"{_signed(after - before, 2)} points"),
    "": Unit(lambda value: f"{value:.4f}", lambda before, after: _signed(after - before, 4)),
}
"""Unit of a measure -> how it is written; the empty unit is that of a plain metric."""


def measured(before: float | None, after: float | None, unit: str) -> tuple[str, str, str]:
    """Before, after and change as text; what is not there is left empty."""
    write = UNITS.get(unit) or Unit(lambda value: f"{value:.4g} {unit}", relative_change)
    texts = ["" if value is None else write.value(value) for value in (before, after)]
    return texts[0], texts[1], "" if before is None or after is None else write.change(before, after)


def arrow(before: str | None, after: str | None) -> str:
    """``before → after``, or one text where they are equal or only one is there."""
    if before is None or after is None or before == after:
        return (before if after is None else after) or ""
    return f"{before} → {after}"


def counted(count: int, noun: str) -> str:
    """``1 pass``, ``3 passes``."""
    ending = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count} {noun}{ending}"
