"""Ranges of activations, observed on calibration batches."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
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

FORMAT = 1

_UNBOUNDED = Range(-math.inf, math.inf)
_EMPTY = Range(0.0, 0.0)
_INFINITE = 2.0**100
"""Masks add values such as the lowest float32 to scores: from here on a value counts as infinite."""


@dataclass(frozen=True, repr=False)
class RangeReport:
    """The range of each value of a Program.

    Attributes:
        ranges: Node name -> range; nodes whose value is not floating point are left out.
        rows: Samples that were seen.
        source: What made it: the pass, as pipeline text.
    """

    ranges: Mapping[str, Range]
    rows: int
    source: str

    def __repr__(self) -> str:
        return f"RangeReport({len(self.ranges)} values, {self.rows} samples, {self.source})"

    @property
    def statistics(self) -> dict[str, int | float]:
        """Counts for the report."""
        return {"values": len(self.ranges), "samples": self.rows}

    def to_json(self) -> str:
        """The report as JSON text, one line a value; an end that is not finite is written as text."""
        lines = [f"{json.dumps(name)}: {json.dumps([*map(_end, _ends(found))])}" for name, found in self.ranges.items()]
        head = f'"format": {FORMAT}, "source": {json.dumps(self.source)}, "rows": {self.rows}'
        return f'{{{head}, "ranges": {{\n ' + ",\n ".join(lines) + "\n}}\n"

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
            ranges = {str(name): Range(*map(float, ends)) for name, ends in data["ranges"].items()}
            return cls(ranges, int(data["rows"]), str(data["source"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"the text is no report of ranges: {error}; write it with to_json") from error


def _ends(found: Range) -> tuple[float, float]:
    return found.low, found.high


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
    """

    name: ClassVar[str] = "ranges"

    observer: str = "minmax"
    batches: int = 64
    least: int = 8
    bits: int = 8
    symmetric: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        observer_of(self.observer)
        if self.batches < 1:
            raise InputError(f"batches must be at least 1, not {self.batches}")

    def run(self, program: Program, task: Task | None) -> RangeReport:
        observe = _Observation(program.graph_module, observer_of(self.observer))
        batches = calibration_stream(program, task, self.name, self.batches)
        rows = 0
        for index, leaves in enumerate(shown_batches(batches, self.name)):
            observe.batch = index
            with torch.no_grad(), seeded():
                observe.run(*leaves)
            rows += _rows(program, leaves)
        if rows < self.least:
            raise InputError(
                f"{self.name} saw {rows} calibration samples, which is too few to know a range by; give "
                f"Task.calibration at least {self.least}, or set least={max(rows, 1)}"
            )
        grid = Grid(self.bits, self.symmetric)
        ranges = {name: found.range(grid) for name, found in observe.found.items()}
        unbounded = dict.fromkeys(observe.unbounded, _UNBOUNDED)
        return RangeReport({**dict.fromkeys(observe.empty, _EMPTY), **ranges, **unbounded}, rows, str(self))


def _rows(program: Program, leaves: list[Any]) -> int:
    """Samples in a batch; a batch without a batch dim is one."""
    return next((leaves[index].shape[dim] for index, dim in program.interface.batch.items()), 1)


class _Observation(fx.Interpreter):
    """Runs a Program and shows every floating-point value to an observer of its own."""

    def __init__(self, root: fx.GraphModule, kind: type[Observer]) -> None:
        super().__init__(root)
        self._kind = kind
        self.batch = 0
        self.found: dict[str, Observer] = {}
        self.unbounded: dict[str, None] = {}
        self.empty: dict[str, None] = {}
        self._nan: dict[int, str] = {}

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
        if math.isnan(low):
            self._nan.setdefault(self.batch, node.name)
        if not max(-low, high) < _INFINITE:  # or NaN
            self.unbounded[node.name] = None
            return
        if node.name not in self.found:
            self.found[node.name] = self._kind()
        self.found[node.name].update(value)

    def _check_outputs(self, outputs: Any) -> None:
        """A model may repair NaN on its way; what comes out of it must be numbers."""
        first = self._nan.get(self.batch)
        if first is None:
            return
        leaves = (leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point())
        if any(bool(leaf.isnan().any()) for leaf in leaves):
            raise InputError(
                f"{first} computes NaN on calibration batch {self.batch}; check that batch, or the weights of the "
                f"layers before {first}"
            )
