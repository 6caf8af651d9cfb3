"""What stays of each node's value, in the oracle's terms."""

from __future__ import annotations

from fxcompress.passes.channels.groups import ChannelReport
from fxcompress.passes.channels.layout import Dim, Layout, is_dynamic
from fxcompress.passes.channels.units import Mask

from fxcompress.verification.oracle import Kept, KeptDim, KeptFactor, KeptShape


def kept_shapes(report: ChannelReport, removed: Mask) -> Kept:
    """For each node whose value shrinks, what stays of each dim."""
    survivors = report.survivors(removed)

    def dim(factors: Dim) -> KeptDim:
        return tuple(
            KeptFactor(None if is_dynamic(factor.size) else factor.size, survivors.factor(factor)) for factor in factors
        )

    def shape(layout: Layout) -> KeptShape:
        return tuple(dim(factors) for factors in layout)

    def shrinks(layout: Layout) -> bool:
        return survivors.shrinks(*layout)

    found: dict[str, KeptShape | list[KeptShape]] = {}
    for name, layout in report.layouts.items():
        if isinstance(layout, list):
            if any(shrinks(each) for each in layout):
                found[name] = [shape(each) for each in layout]
        elif shrinks(layout):
            found[name] = shape(layout)
    return found
