"""What the manager notes about each pass that ran."""

from __future__ import annotations

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
        if self.result is None:
            return self.text
        done = [f"{name} {count}" for name, count in self.result.statistics.items() if count]
        refused = len(self.result.refusals)
        if refused:
            done.append(f"{refused} refusal{'s' * (refused > 1)}")
        return f"{self.text} ({', '.join(done) or 'nothing to do'})"

    @property
    def text(self) -> str:
        """The pass as pipeline text."""
        return str(self.item)

    @property
    def changed(self) -> bool:
        """Whether the pass changed the Program."""
        return self.result is not None and self.result.changed
