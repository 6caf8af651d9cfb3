"""Geometry of the HTML report's charts; the template draws it as SVG."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from fxcompress import formatting
from fxcompress.report.rows import Figures, LayerFigures, LayerRow

WIDTH, HEIGHT = 640.0, 180.0
_TICKS = 4
_KINDS = 6

Quantity = Callable[[Figures], int]


@dataclass(frozen=True)
class Column:
    """One layer in a chart: a bar for before behind a bar for after; heights in the chart's units."""

    x: float
    width: float
    before: float
    after: float
    label: str


@dataclass(frozen=True)
class Chart:
    """A quantity over the layers in execution order.

    Attributes:
        title: What is drawn.
        columns: One per layer that has any of it.
        ticks: Height and label of each grid line.
    """

    title: str
    columns: tuple[Column, ...]
    ticks: tuple[tuple[float, str], ...]


@dataclass(frozen=True)
class Segment:
    """A part of a stacked bar: ``x`` and ``width`` in percent, ``color`` the number of its kind."""

    x: float
    width: float
    color: int
    label: str


@dataclass(frozen=True)
class Shares:
    """How totals split up by kind of layer.

    Attributes:
        kinds: The kinds, largest first; what is beyond the palette is summed up as ``other``.
        bars: Name of each bar and its segments.
    """

    kinds: tuple[str, ...]
    bars: tuple[tuple[str, tuple[Segment, ...]], ...]


def charts(rows: Sequence[LayerRow]) -> list[Chart]:
    """The charts that have anything to show."""
    drawn = [
        _chart("MACs per layer", rows, lambda cost: cost.macs, formatting.MACS),
        _chart("Parameters per layer", rows, lambda cost: cost.params, formatting.PARAMS),
        _chart("Weight bytes per layer", rows, lambda cost: cost.weight_bytes, formatting.BYTES),
    ]
    return [chart for chart in drawn if chart.columns]


def _chart(title: str, rows: Iterable[LayerRow], quantity: Quantity, scale: formatting.Scale) -> Chart:
    def amount(side: LayerFigures | None) -> int:
        return 0 if side is None else quantity(side)

    measured = [(row, amount(row.before), amount(row.after)) for row in rows]
    values = [item for item in measured if item[1] or item[2]]
    top = max((max(before, after) for _, before, after in values), default=1)
    slot = WIDTH / max(len(values), 1)
    width = min(0.8 * slot, 40.0)
    columns = tuple(
        Column(
            x=(index + 0.5) * slot - width / 2,
            width=width,
            before=HEIGHT * before / top,
            after=HEIGHT * after / top,
            label=f"{row.name}: {formatting.arrow(scale.text(before), scale.text(after))} ({row.status})",
        )
        for index, (row, before, after) in enumerate(values)
    )
    ticks = tuple((HEIGHT * value / top, label) for value, label in scale.ticks(top, _TICKS))
    return Chart(title, columns, ticks)


def shares(rows: Sequence[LayerRow]) -> Shares:
    """MACs and parameters by kind of layer, before and after."""
    sides = {
        "before": [row.before for row in rows if row.before is not None],
        "after": [row.after for row in rows if row.after is not None],
    }
    quantities: dict[str, Quantity] = {"MACs": lambda cost: cost.macs, "params": lambda cost: cost.params}
    bars = {
        f"{name} {side}": _by_kind(costs, quantity)
        for name, quantity in quantities.items()
        for side, costs in sides.items()
    }
    weight: dict[str, float] = {}
    for parts in bars.values():
        for kind, part in parts.items():
            weight[kind] = max(weight.get(kind, 0.0), part)
    ranked = sorted((kind for kind in weight if weight[kind] > 0), key=lambda kind: -weight[kind])
    kinds = ranked if len(ranked) <= _KINDS else [*ranked[: _KINDS - 1], "other"]
    return Shares(tuple(kinds), tuple((name, tuple(_segments(parts, kinds))) for name, parts in bars.items() if parts))


def _by_kind(costs: Iterable[LayerFigures], quantity: Quantity) -> dict[str, float]:
    """Kind -> its share of the sum, between 0 and 1; empty if there is nothing to share."""
    found: dict[str, int] = {}
    for cost in costs:
        found[cost.kind] = found.get(cost.kind, 0) + quantity(cost)
    total = sum(found.values())
    return {kind: value / total for kind, value in found.items()} if total else {}


def _segments(parts: dict[str, float], kinds: Sequence[str]) -> Iterator[Segment]:
    shown = {kind: parts.get(kind, 0.0) for kind in kinds}
    if kinds and kinds[-1] == "other":
        shown["other"] = max(0.0, sum(parts.values()) - sum(shown.values()) + shown["other"])
    x = 0.0
    for color, (kind, part) in enumerate(shown.items()):
        if part > 0:
            yield Segment(100 * x, 100 * part, color, f"{kind}: {100 * part:.1f} %")
        x += part
