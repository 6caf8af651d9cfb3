"""Ranges of activations, observed on calibration batches."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from fxcompress.passes.calibrated.progress import shown_batches
from fxcompress.passes.quantization.grid import Grid, Range
from fxcompress.passes.quantization.observers import Observer, observer_of
from torch import fx
from torch.utils._pytree import tree_leaves

from fxcompress.calibration import calibration_stream
from fxcompress.errors import InputError
from fxcompress.ir.program import Program
from fxcompress.pass_base import Analysis
from fxcompress.task import Task
from fxcompress.tracing.untouched import seeded

FORMAT = 2

_UNBOUNDED = Range(-math.inf, math.inf)
_EMPTY = Range(0.0, 0.0)
_INFINITE = 2.0**100
"""Masks add values such as the lowest float32 to scores: from here on a value counts as infinite."""


@dataclass(frozen=True, repr=False)
class RangeReport:
    """The range of each value of a Program.

    Attributes:
        ranges: Node name -> range; nodes whose value is not floating point are left out.
            With an axis, the smallest range that holds those of its indices.
        rows: Samples that were seen.
        source: What made it: the pass, as pipeline text.
        channels: Node name -> range of each index of the axis, for values that have it; empty without an axis.
    """

    ranges: Mapping[str, Range]
    rows: int
    source: str
    channels: Mapping[str, tuple[Range, ...]] = field(default_factory=dict)

    def __repr__(self) -> str:
        channels = f"{sum(map(len, self.channels.values()))} channels, " if self.channels else ""
        return f"RangeReport({len(self.ranges)} values, {channels}{self.rows} samples, {self.source})"

    @property
    def statistics(self) -> dict[str, int | float]:
        """Counts for the report."""
        return {"values": len(self.ranges), "samples": self.rows}

    def to_json(self) -> str:
        """The report as JSON text, one line a value; an end that is not finite is written as text."""
        head = f'"format": {FORMAT}, "source": {json.dumps(self.source)}, "rows": {self.rows}'
        ranges = _object({name: _ends(found) for name, found in self.ranges.items()})
        channels = _object({name: [*map(_ends, found)] for name, found in self.channels.items()})
        return f'{{{head}, "ranges": {ranges}, "channels": {channels}}}\n'

    @classmethod
    def from_json(cls, text: str) -> RangeReport:
        """Reads what :meth:`to_json` wrote.

        Raises:
            InputError: The text is no report of ranges, or one of another format.
        """
        try:
            data = json.loads(text)
            if data["format"] != FORMAT:
                raise InputError(f"the ranges have format {data['format']}, not {FORMAT}; observe them anew")
            ranges = {str(name): _range(ends) for name, ends in data["ranges"].items()}
            channels = {str(name): tuple(map(_range, found)) for name, found in data["channels"].items()}
            return cls(ranges, int(data["rows"]), str(data["source"]), channels)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"the text is no report of ranges: {error}; write it with to_json") from error


def _object(entries: Mapping[str, Any]) -> str:
    return "{\n " + ",\n ".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items()) + "\n}"


def _ends(found: Range) -> list[float | str]:
    return [_end(found.low), _end(found.high)]


def _range(ends: list[float | str]) -> Range:
    return Range(*map(float, ends))


def _end(value: float) -> float | str:
    return value if abs(value) < math.inf else str(value)


@dataclass(frozen=True)
class Ranges(Analysis[RangeReport]):
    """Observes the range of every activation on the task's calibration batches.

    One pass over the batches, which are read one at a time; what is kept of a value does not grow with them.

    Attributes:
        observer: How a range follows from the values: minmax, moving-average, percentile, mse or entropy.
        batches: How many of the task's calibration batches to use.
        least: Samples that must be there, so that a range is not an accident.
        bits: Bits of the integers that the range is for (mse, entropy).
        symmetric: Whether 0 will be the middle of the integers (mse, entropy).
        axis: Dim each index of which has a range of its own, such as 1 for the channels of an image or -1 for those of
            a token; none looks at each value as a whole. All but minmax and moving-average hold 64 KB for each index.
    """

    name: ClassVar[str] = "ranges"

    observer: str = "minmax"
    batches: int = 64
    least: int = 8
    bits: int = 8
    symmetric: bool = False
    axis: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        observer_of(self.observer)
        if self.batches < 1:
            raise InputError(f"batches must be at least 1, not {self.batches}")

    def run(self, program: Program, task: Task | None) -> RangeReport:
        observe = _Observation(program.graph_module, observer_of(self.observer), self.axis)
        batches = calibration_stream(program, task, self.name, self.batches)
        rows = 0
        for index, leaves in enumerate(shown_batches(batches, self.name)):
            observe.show(index, leaves)
            rows += _rows(program, leaves)
        if rows < self.least:
            raise InputError(
                f"{self.name} saw {rows} calibration samples, which is too few to know a range by; give "
                f"Task.calibration at least {self.least}, or set least={max(rows, 1)}"
            )
        grid = Grid(self.bits, self.symmetric)
        found = {name: tuple(each.range(grid) for each in slices) for name, slices in observe.found.items()}
        ranges = {name: functools.reduce(Range.united, slices) for name, slices in found.items()}
        unbounded = dict.fromkeys(observe.unbounded, _UNBOUNDED)
        channels = {name: slices for name, slices in found.items() if name in observe.sliced - unbounded.keys()}
        everything = {**dict.fromkeys(observe.empty, _EMPTY), **ranges, **unbounded}
        return RangeReport(everything, rows, str(self), channels)


def _rows(program: Program, leaves: list[Any]) -> int:
    """Samples in a batch; a batch without a batch dim is one."""
    return next((leaves[index].shape[dim] for index, dim in program.interface.batch.items()), 1)


class _Observation(fx.Interpreter):
    """Runs a Program and shows every floating-point value, or each index of its axis, to an observer of its own."""

    def __init__(self, root: fx.GraphModule, kind: type[Observer], axis: int | None) -> None:
        super().__init__(root)
        self.extra_traceback = False  # it would be part of our messages
        self._kind, self._axis = kind, axis
        self._batch = 0
        self.found: dict[str, list[Observer]] = {}
        self.sliced: set[str] = set()
        self.unbounded: dict[str, None] = {}
        self.empty: dict[str, None] = {}
        self._first: dict[str, fx.Node] = {}

    def show(self, index: int, leaves: list[Any]) -> None:
        """Observes what the Program computes on a batch."""
        self._batch, self._first = index, {}
        try:
            with torch.no_grad(), seeded():
                self.run(*leaves)
        except (RuntimeError, IndexError) as error:  # torch's operators raise these
            raise InputError(f"the model fails on calibration batch {index}: {error}; check that batch") from error

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "output":
            self._check_outputs(value)
        if n.op not in ("get_attr", "output") and isinstance(value, torch.Tensor) and value.is_floating_point():
            self._observe(n, value)
        return value

    def _observe(self, node: fx.Node, value: torch.Tensor) -> None:
        if value.numel() == 0:
            self.empty[node.name] = None
            return
        low, high = (end.item() for end in value.aminmax())
        if not max(-low, high) < _INFINITE:  # or NaN
            self.unbounded[node.name] = None
            self._first.setdefault("NaN" if math.isnan(low) else "infinite", node)
            return
        slices = self._slices(node, value)
        if node.name not in self.found:
            self.found[node.name] = [self._kind() for _ in slices]
        observers = self.found[node.name]
        if len(observers) != len(slices):
            raise InputError(
                f"{node.name} has {len(observers)} indices along axis {self._axis}, and {len(slices)} on calibration "
                f"batch {self._batch}; choose an axis that always has the same size"
            )
        for each, part in zip(observers, slices, strict=True):
            each.update(part)

    def _slices(self, node: fx.Node, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self._axis is None or not -value.dim() <= self._axis < value.dim():
            return (value,)
        self.sliced.add(node.name)
        return value.unbind(self._axis)

    def _check_outputs(self, outputs: Any) -> None:
        """A model may repair NaN on its way; what comes out of it must be numbers."""
        first = self._first.get("NaN")
        leaves = (leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point())
        if first is None or not any(bool(leaf.isnan().any()) for leaf in leaves):
            return
        where, infinite = f"calibration batch {self._batch}", self._first.get("infinite")
        if first.op == "placeholder":
            raise InputError(f"{first.name} is NaN on {where}, and so is what the model gives; leave that batch out")
        cause = f", where {infinite.name} is infinite" if infinite is not None else ""
        raise InputError(
            f"{first.name} computes NaN on {where}{cause}; check that batch, or the weights of the layers before "
            f"{first.name}"
        )
