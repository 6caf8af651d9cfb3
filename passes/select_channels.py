"""Chooses what to remove: the least important units of each channel group."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
from fxcompress.passes.channels.criteria import Criterion, Evidence, criterion_of
from fxcompress.passes.channels.criteria.totals import Scores
from fxcompress.passes.channels.frozen import frozen
from fxcompress.passes.channels.groups import ChannelGroup, ChannelReport
from fxcompress.passes.channels.patterns import Patterns
from fxcompress.passes.channels.plan import ChannelPlan, Removal, digest, listed
from fxcompress.passes.channels.price import Price
from fxcompress.passes.channels.ranking import Candidate, Ranking
from fxcompress.passes.channels.roles import Roles
from fxcompress.passes.channels.selection import Selection
from fxcompress.passes.channels.units import Mask

from fxcompress.errors import InputError
from fxcompress.ir.program import Program
from fxcompress.pass_base import Analysis, Refusal
from fxcompress.task import Task

_RATIO = 0.5


@dataclass(frozen=True)
class SelectChannels(Analysis[ChannelPlan]):
    """Plans which channels, heads and groups to remove.

    A pattern such as ``layer4.*`` means the channels that the parameters of that name make; one with a dim, such as
    ``fc.weight:1``, whatever channels are there.

    Attributes:
        ratio: Share of each group's units to remove, from 0 to below 1; 0.5 unless ``macs`` asks for another.
        macs: Share of the multiply-accumulates to keep; the ratio that gives it is searched for. By a criterion
            that estimates a change of the loss, groups that are ranked together compete by that change for each
            multiply-accumulate saved (as in arXiv:1801.05787).
        ratios: Ratios of the groups that a pattern matches; the first that matches wins.
        ignore: Patterns of groups to keep whole.
        criterion: How importance is measured; by default ``output`` where the task has batches, else ``l2``.
        scope: What is ranked together: each group (uniform), all (global), or those built alike (isomorphic). By
            default all where ``macs`` is given and the criterion estimates a change of the loss, else each group.
        factors: Which factors of products to remove from: outer (heads, groups), inner (head dims, channels in a
            group), or all.
        round_to: Keep multiples of this many channels in each dim, rounded up.
        min_width: Keep at least this many units of each group.
        batches: How many of the task's batches a criterion that needs data looks at.
        seed: Seed of criterion=random and of the order of batches.
    """

    name: ClassVar[str] = "select-channels"
    requires: ClassVar[tuple[str, ...]] = ("channels",)

    ratio: float | None = None
    macs: float | None = None
    ratios: Mapping[str, float] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()
    criterion: str | None = None
    scope: Literal["uniform", "global", "isomorphic"] | None = None
    factors: Literal["all", "outer", "inner"] = "all"
    round_to: int = 1
    min_width: int = 1
    batches: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.criterion is not None:
            criterion_of(self.criterion)
        for what, ratio in (("ratio", self.ratio), *((f"ratios of {name!r}", r) for name, r in self.ratios.items())):
            if ratio is not None and not 0 <= ratio < 1:
                raise InputError(f"{what} must be at least 0 and below 1, not {ratio:g}: it is the share to remove")
        if self.macs is not None and not 0 < self.macs <= 1:
            raise InputError(f"macs must be above 0 and at most 1, not {self.macs:g}: it is the share to keep")
        if self.macs is not None and self.ratio is not None:
            raise InputError("ratio and macs both say how much to remove; give one")
        for option in ("round_to", "min_width", "batches"):
            if getattr(self, option) < 1:
                raise InputError(f"{option.replace('_', '-')} must be at least 1, not {getattr(self, option)}")

    def run(self, program: Program, task: Task | None) -> ChannelPlan:
        report: ChannelReport = program.analyze("channels")
        refusals = [*frozen(program, report)]
        if not report.groups:
            refusals.append(Refusal("nothing-removable", program.name, "no parameter has a channel that can go"))
        price = Price(program, report)
        criterion = self._criterion(task)
        scores = criterion.measure(Evidence(program, report, task, self.batches, self.seed))
        candidates = tuple(self._candidates(program, report, criterion, scores, price, refusals))
        selection = Selection(report, Ranking(candidates), self.round_to)
        ratio, removed = self._chosen(selection, price)
        removals = tuple(self._removals(candidates, removed, criterion.name, ratio))
        macs = price.whole, price.macs(removed)
        return ChannelPlan(digest(program), removals, tuple(refusals), str(self), macs)

    def _chosen(self, selection: Selection, price: Price) -> tuple[float, Mask]:
        if self.macs is not None:
            return selection.at_macs(price, self.macs)
        ratio = _RATIO if self.ratio is None else self.ratio
        return ratio, selection.at_ratio(ratio)

    def _criterion(self, task: Task | None) -> Criterion:
        has_batches = task is not None and (task.calibration is not None or task.training is not None)
        return criterion_of(self.criterion or ("output" if has_batches else "l2"))

    def _candidates(
        self,
        program: Program,
        report: ChannelReport,
        criterion: Criterion,
        scores: Scores,
        price: Price,
        refusals: list[Refusal],
    ) -> Iterator[Candidate]:
        """The groups to remove from; those that are left out go to the refusals."""
        roles, by_loss = Roles(program), self.macs is not None and criterion.scale == "loss"
        pool_of = _POOL[self.scope or ("global" if by_loss else "uniform")]
        ignored = Patterns("ignore", self.ignore, report, roles)
        ratios = Patterns("ratios", self.ratios, report, roles)
        left_out: dict[tuple[str, str, str], list[str]] = defaultdict(list)
        for number, group in enumerate(report.groups):
            own, keeper = scores[group.units], ignored.first(number)
            if keeper is not None:
                left_out["ignored", keeper, "ignore says to keep"].append(group.name)
            elif not np.isfinite(own).all():
                left_out["no-score", criterion.name, "this criterion gives no finite score to"].append(group.name)
            elif self.factors in ("all", group.factor) or group.factor == "whole":
                pool, pattern = pool_of(roles, number, group), ratios.first(number)
                ratio = None if pattern is None else self.ratios[pattern]
                comparable = _by_mean(own) if criterion.scale == "group" else own
                if by_loss:
                    comparable = _by_price(comparable, price.saved(group.units[0]))
                yield Candidate(number, group, comparable, pool, ratio, self.min_width, pattern)
        for (code, node, why), names in left_out.items():
            refusals.append(Refusal(code, node, f"{why} {listed(names)}"))

    def _removals(
        self, candidates: Iterable[Candidate], removed: Mask, criterion: str, ratio: float
    ) -> Iterator[Removal]:
        for each in candidates:
            gone = np.flatnonzero(removed[each.group.units])
            if len(gone):
                share = f"ratio {ratio:.3g}" if each.ratio is None else f"ratio {each.ratio:g} of {each.pattern!r}"
                yield Removal(
                    each.number, each.group.name, each.group.factor, len(each.group), tuple(gone.tolist()),
                    tuple(map(str, each.group.members)), f"{criterion}, {share}"
                )  # fmt: skip


def _by_mean(scores: Scores) -> Scores:
    """Scores that compare between groups: 1 is the mean of the group."""
    mean = float(scores.mean())
    return scores / mean if mean > 0 else np.ones_like(scores)


def _by_price(scores: Scores, saved: int) -> Scores:
    """Scores for each multiply-accumulate that a unit saves; what saves none goes last."""
    return scores / saved if saved > 0 else np.full_like(scores, np.inf)


_POOL: Mapping[str, Callable[[Roles, int, ChannelGroup], Hashable]] = {
    "uniform": lambda roles, number, group: number,
    "global": lambda roles, number, group: None,
    "isomorphic": lambda roles, number, group: roles.structure(group),
}
"""Scope -> what the groups that are ranked together have in common (isomorphic: arXiv:2407.04616)."""
