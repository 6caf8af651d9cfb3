"""What the manager notes about each pass that ran."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fxcompress.pass_base import Pass, PassResult

if TYPE_CHECKING:
    from fxcompress.verification.numerics import Comparison


@dataclass(frozen=True)
class Record:
    """One pass of a run.

    Attributes:
        index: Position in the pipeline, from 1.
        item: The pass.
        seconds: Time in the pass itself, without copies and checks.
        result: What a transform did; ``None`` for an analysis.
        value: What an analysis found; ``None`` for a transform.
        comparison: Output before against after, where it was measured.
    """

    index: int
    item: Pass
    seconds: float
    result: PassResult | None = None
    value: Any = None
    comparison: Comparison | None = None

    def __str__(self) -> str:
        """The pass with what it did: ``fold-batchnorm (folded 20, 1 refusal)``."""
        done = [f"{name} {count}" for name, count in self.statistics.items() if count]
        if self.result is None:
            return f"{self.text} ({', '.join(done)})" if done else self.text
        refused = len(self.result.refusals)
        if refused:
            done.append(f"{refused} refusal{'s' * (refused > 1)}")
        return f"{self.text} ({', '.join(done) or 'nothing to do'})"

    @property
    def statistics(self) -> Mapping[str, int | float]:
        """Counts by name: what a transform did, or what an analysis says of its value in ``statistics``."""
        found = self.result if self.result is not None else self.value
        return dict(getattr(found, "statistics", {}))

    @property
    def text(self) -> str:
        """The pass as pipeline text."""
        return str(self.item)

    @property
    def changed(self) -> bool:
        """Whether the pass changed the Program."""
        return self.result is not None and self.result.changed
