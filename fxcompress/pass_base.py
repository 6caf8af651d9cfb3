"""What a pass is: a frozen dataclass whose fields are its options.

An :class:`Analysis` reads a Program and returns a value; a :class:`Transform` rewrites a Program that the manager has
copied for it, and says what it did in a :class:`PassResult`. Subclasses set the class variables, declare options as
dataclass fields with defaults, and hold no run state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

from fxcompress.pipeline.options import freeze_options

if TYPE_CHECKING:
    from fxcompress.ir.program import Program
    from fxcompress.task import Task
    from fxcompress.verification.oracle import Kept

T = TypeVar("T")

Guarantee = Literal["exact", "lossy"]


@dataclass(frozen=True)
class Refusal:
    """A rewrite that matched but was not safe.

    Attributes:
        code: Stable kebab-case identifier, for example ``shared-weight``.
        node: Name of the node or layer it is about.
        reason: Why it was not done, and what would allow it.
    """

    code: str
    node: str
    reason: str

    def __str__(self) -> str:
        return f"{self.code} [{self.node}]: {self.reason}"


@dataclass(frozen=True)
class PassResult:
    """What a transform did.

    Attributes:
        changed: Whether the Program differs from before; the manager checks this.
        refusals: Rewrites that matched but were not safe.
        statistics: Counts by name, for example ``{"folded": 20}``.
    """

    changed: bool
    refusals: tuple[Refusal, ...] = ()
    statistics: Mapping[str, int | float] = field(default_factory=dict)


@dataclass(frozen=True)
class Pass(ABC):
    """Base of analyses and transforms.

    Class attributes:
        name: kebab-case name in pipeline text.
        requires: Names of analyses that are computed before the pass runs.
    """

    name: ClassVar[str]
    requires: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        """Checks the options' types and freezes lists and dicts; a subclass that checks ranges calls this first."""
        freeze_options(self)

    def __str__(self) -> str:
        from fxcompress.pipeline.text import pass_text

        return pass_text(self)


@dataclass(frozen=True)
class Analysis(Pass, Generic[T]):
    """A read-only pass that returns a frozen value."""

    @abstractmethod
    def run(self, program: Program, task: Task | None) -> T:
        """Computes the value; must not change the Program."""


@dataclass(frozen=True)
class Transform(Pass):
    """A pass that rewrites a Program in place.

    Class attributes:
        preserves: Names of analyses whose cached values stay right after the rewrite.
        guarantee: ``exact`` when the output must not change; ``lossy`` when the error is measured and reported.
    """

    preserves: ClassVar[tuple[str, ...]] = ()
    guarantee: ClassVar[Guarantee]

    def kept(self, before: Program) -> Kept | None:
        """What stays of each node's value, for a transform that removes parts of them; the oracle then checks it."""
        return None

    @abstractmethod
    def run(self, program: Program, task: Task | None) -> PassResult:
        """Rewrites ``program``; puts new tensors in place and never writes into the old ones."""


def describe(value: Any) -> str:
    """First line of a pass's docstring."""
    documented = value if isinstance(value, type) else type(value)
    return (documented.__doc__ or "").strip().partition("\n")[0]
