"""What a report holds: plain frozen values, each comparable and serialisable."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from fxcompress.pass_base import Refusal
from fxcompress.verification.numerics import Comparison


class Status(StrEnum):
    """What became of a layer."""

    KEPT = "kept"
    CHANGED = "changed"
    REMOVED = "removed"
    ADDED = "added"


@dataclass(frozen=True)
class Figures:
    """What a layer, or a sum of layers, costs.

    Attributes:
        params: Parameters, each shared one counted once.
        macs: Multiply-accumulates for one sample.
        weight_bytes: Bytes of parameters and buffers, each shared one counted once.
        activation_bytes: Bytes of the output for one sample.
    """

    params: int = 0
    macs: int = 0
    weight_bytes: int = 0
    activation_bytes: int = 0

    @classmethod
    def of(cls, costs: Iterable[Figures | None]) -> Figures:
        """The sum; ``None`` counts nothing."""
        there = [cost for cost in costs if cost is not None]
        return cls(
            sum(cost.params for cost in there),
            sum(cost.macs for cost in there),
            sum(cost.weight_bytes for cost in there),
            sum(cost.activation_bytes for cost in there),
        )


@dataclass(frozen=True, kw_only=True)
class LayerFigures(Figures):
    """What one layer costs on one side of the report.

    Attributes:
        kind: Class of the module, or name of the operator.
        output_shape: Shape of the output for one sample; empty for a scalar and for what is no tensor.
        dtype: Element type of the output.
    """

    kind: str
    output_shape: tuple[int, ...] = ()
    dtype: str = ""

    @property
    def shape(self) -> str:
        """The output shape as text."""
        return "x".join(map(str, self.output_shape))


@dataclass(frozen=True)
class LayerRow:
    """A layer before and after.

    Attributes:
        name: Qualified name, or the node's name where it is no module; ``name@1`` is a second call.
        before: What it cost in the Program before; ``None`` when added.
        after: What it costs now; ``None`` when removed or merged into another layer.
        note: What else there is to know, such as passes that refused it.
        path: Where it stands in the tree of modules: its name, below the module that calls it if it is an operator.
    """

    name: str
    before: LayerFigures | None
    after: LayerFigures | None
    note: str = ""
    path: str = ""

    def __post_init__(self) -> None:
        if not self.path:
            object.__setattr__(self, "path", self.name)

    @property
    def status(self) -> Status:
        if self.before is None:
            return Status.ADDED
        if self.after is None:
            return Status.REMOVED
        return Status.KEPT if self.before == self.after else Status.CHANGED

    @property
    def kind(self) -> str:
        """The kind it has now, or had when it was removed."""
        figures = self.after or self.before
        return figures.kind if figures is not None else ""


@dataclass(frozen=True)
class PassRow:
    """What one pass did.

    Attributes:
        text: The pass as pipeline text.
        seconds: Time in the pass itself.
        changed: Whether it changed the Program.
        statistics: Counts by name.
        refusals: Rewrites that matched but were not safe.
        comparison: Output before against after, where it was measured.
    """

    text: str
    seconds: float
    changed: bool
    statistics: Mapping[str, int | float] = field(default_factory=dict)
    refusals: tuple[Refusal, ...] = ()
    comparison: Comparison | None = None

    @property
    def error(self) -> str:
        """The measured numeric error as text; empty where none was measured."""
        return "" if self.comparison is None else str(self.comparison)

    @property
    def counts(self) -> str:
        """The statistics that are not zero, as text."""
        return ", ".join(f"{name} {value:g}" for name, value in self.statistics.items() if value)


@dataclass(frozen=True)
class Measure:
    """Something measured on both models: accuracy, latency, a file's size.

    Attributes:
        name: What was measured, such as ``top-1`` or ``latency (batch 1)``.
        before: Its value for the model before; ``None`` if not measured.
        after: Its value for the model after; ``None`` if not measured.
        unit: ``ms``, ``B``, ``%``, or empty for a plain number; any other unit is shown as it is.
    """

    name: str
    before: float | None
    after: float | None
    unit: str = ""
