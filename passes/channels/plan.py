"""Plans: which units to remove from a Program, as data that can be read, kept, sent and applied later."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from fxcompress.passes.channels.groups import ChannelReport
from fxcompress.passes.channels.units import Array, Mask
from tabulate import tabulate

from fxcompress.analysis import latest
from fxcompress.errors import InputError
from fxcompress.formatting import MACS, counted
from fxcompress.ir.ops import get_module
from fxcompress.ir.program import Program
from fxcompress.pass_base import Refusal

FORMAT = 1

_KINDS = {"whole": "channels", "outer": "outer factor", "inner": "inner factor"}
_SHOWN = 4

T = TypeVar("T")


@dataclass(frozen=True)
class Removal:
    """What goes from one group.

    Attributes:
        group: Number of the group in the channels report.
        name: Its first member, ``parameter:dim``.
        factor: ``whole``, ``outer`` or ``inner``, as in the report.
        size: Units of the group.
        removed: Places of those that go, within the group, ascending.
        members: All its members.
        reason: Why these.
    """

    group: int
    name: str
    factor: str
    size: int
    removed: tuple[int, ...]
    members: tuple[str, ...]
    reason: str = ""


@dataclass(frozen=True, repr=False)
class ChannelPlan:
    """A choice of units to remove.

    Attributes:
        model: Digest of the structure that the plan is for; weights do not count.
        removals: What goes, by group; groups that stay whole are left out.
        refusals: What stays although it could have been meant, and why.
        source: What made it: the pass, as pipeline text.
        macs: Multiply-accumulates of one sample before and after, if known.
    """

    model: str
    removals: tuple[Removal, ...]
    refusals: tuple[Refusal, ...] = ()
    source: str = "the plan"
    macs: tuple[int, int] | None = None

    def __repr__(self) -> str:
        gone = sum(len(removal.removed) for removal in self.removals)
        return f"ChannelPlan(removes {counted(gone, 'unit')} from {counted(len(self.removals), 'group')})"

    @property
    def statistics(self) -> dict[str, int | float]:
        """Counts for the report."""
        gone = sum(len(removal.removed) for removal in self.removals)
        return {"chose units": gone, "in groups": len(self.removals)}

    def explain(self) -> str:
        """What goes, from where and why, and what stays and why."""
        lines = [*self._summary()]
        if self.removals:
            rows = [
                (r.name, _KINDS[r.factor], f"{r.size} -> {r.size - len(r.removed)}", listed(r.members), r.reason)
                for r in self.removals
            ]
            lines += ["", tabulate(rows, ["group", "of", "kept", "dims", "why"])]
        if self.refusals:
            lines += ["", "What stays:", *(f"  {refusal}" for refusal in self.refusals)]
        return "\n".join(lines)

    def _summary(self) -> Iterator[str]:
        gone, size = sum(len(r.removed) for r in self.removals), sum(r.size for r in self.removals)
        if not gone:
            yield f"{self.source} removes nothing."
            return
        yield f"{self.source} removes {gone} of {counted(size, 'unit')} from {counted(len(self.removals), 'group')}."
        if self.macs is not None:
            before, after = self.macs
            yield f"MACs: {MACS.text(before)} -> {MACS.text(after)} ({after / max(before, 1):.1%})"

    def to_json(self) -> str:
        """The plan as JSON text, one line a group."""
        data = asdict(self)
        lists = {name: [json.dumps(entry) for entry in data.pop(name)] for name in ("removals", "refusals")}
        lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in {"format": FORMAT, **data}.items()]
        lines += [f"{json.dumps(name)}: [" + ",\n  ".join(entries) + "]" for name, entries in lists.items()]
        return "{" + ",\n ".join(lines) + "}\n"

    @classmethod
    def from_json(cls, text: str) -> ChannelPlan:
        """Reads what :meth:`to_json` wrote.

        Raises:
            InputError: The text is no plan, or one of another format.
        """
        try:
            data = _entry(json.loads(text))
            if data["format"] != FORMAT:
                raise InputError(f"the plan has format {data['format']!r}; this version reads {FORMAT}")
            return cls(
                model=_text(data["model"]),
                source=_text(data["source"]),
                removals=_list(lambda entry: _removal(_entry(entry)), data["removals"]),
                refusals=_list(lambda entry: Refusal(**_texts(_entry(entry))), data["refusals"]),
                macs=None if data["macs"] is None else _pair(data["macs"]),
            )
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise InputError(f"this is no channel plan ({error!r}); write one with ChannelPlan.to_json") from error

    def mask(self, program: Program, report: ChannelReport) -> Mask:
        """The units to remove, for the report of the Program that the plan is for.

        Raises:
            InputError: The plan is for a Program of another structure, or leaves nothing of a tensor.
        """
        found = digest(program)
        if found != self.model:
            raise InputError(
                f"the plan is for another model (structure {self.model[:12]}, this one is {found[:12]}); "
                "run select-channels on this one"
            )
        mask = report.removed_mask([])
        for removal in self.removals:
            mask[_units(report, removal)] = True
        for name, _ in report.survivors(mask).emptied():
            raise InputError(f"the plan leaves nothing of a dim of {name}; leave at least one of its channels")
        return mask


def _units(report: ChannelReport, removal: Removal) -> Array:
    if not 0 <= removal.group < len(report.groups):
        raise InputError(
            f"the plan names group {removal.group} ({removal.name}), but the model has {len(report.groups)} groups; "
            "run select-channels on it"
        )
    group, places = report.groups[removal.group], np.array(removal.removed, np.int64)
    size = len(group)
    if (group.name, group.factor, size) != (removal.name, removal.factor, removal.size):
        raise InputError(
            f"the plan says that group {removal.group} is {removal.name} of {removal.size} {removal.factor} units, but "
            f"in this model it is {group.name} of {size} {group.factor} ones; run select-channels on it"
        )
    outside = places[(places < 0) | (places >= size)]
    if len(outside):
        raise InputError(f"the plan removes unit {outside[0]} of group {removal.name}, which has units 0 to {size - 1}")
    different = len(np.unique(places))
    if different == size:
        raise InputError(f"the plan removes all {size} units of group {removal.name}; leave at least one")
    if different < len(places):
        raise InputError(f"the plan removes units of group {removal.name} twice; name each once")
    return group.units[places]


def listed(names: Sequence[str]) -> str:
    """The first few of some names, and how many more there are."""
    shown, more = ", ".join(names[:_SHOWN]), len(names) - _SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def _removal(entry: dict[str, Any]) -> Removal:
    lists = {"removed": _list(_whole, entry.pop("removed")), "members": _list(_text, entry.pop("members"))}
    numbers = {name: _whole(entry.pop(name)) for name in ("group", "size")}
    made = Removal(**lists, **numbers, **_texts(entry))  # type: ignore[arg-type]
    if made.factor not in _KINDS:
        raise ValueError(f"the factor {made.factor!r}")
    return made


def _list(read: Callable[[Any], T], value: Any) -> tuple[T, ...]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r} in place of a list")
    return tuple(map(read, value))


def _entry(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{value!r} in place of an object")
    return value


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r} in place of a whole number")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} in place of text")
    return value


def _texts(entry: dict[str, Any]) -> dict[str, str]:
    return {name: _text(value) for name, value in entry.items()}


def _pair(value: Any) -> tuple[int, int]:
    before, after = _list(_whole, value)
    return before, after


def planned(program: Program, path: str | None, reader: str) -> tuple[ChannelPlan, ChannelReport, Mask]:
    """The plan that a pass follows, the channel dependencies and the units to remove.

    Args:
        program: The Program that the plan is for.
        path: JSON file of the plan; ``None`` for that of the last ``select-channels``.
        reader: Name of the pass that follows the plan, for messages.

    Raises:
        InputError: There is no plan, or it is for another Program.
    """
    plan = _read(path) if path is not None else latest(program, "select-channels")
    if not isinstance(plan, ChannelPlan):
        raise InputError(f"{reader} needs a plan: put select-channels before it, or give plan=FILE.json")
    report: ChannelReport = program.analyze("channels")
    return plan, report, plan.mask(program, report)


def _read(path: str) -> ChannelPlan:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the plan {path} cannot be read: {error}") from error
    return ChannelPlan.from_json(text)


def digest(program: Program) -> str:
    """A digest of a Program's structure and of its channel dependencies; the weights' values do not count.

    It has all that a plan refers to: the graph, the layers' options, and which unit each element of each parameter
    carries, so that the numbers in a plan mean the same wherever the digest is equal.
    """
    report: ChannelReport = program.analyze("channels")
    found = hashlib.blake2b(report.digest, digest_size=32)
    for node in program.nodes:
        found.update(f"{node.name} {node.op} {node.target} {node.args} {node.kwargs}\n".encode())
        if node.op == "call_module":
            module = get_module(program.graph_module, str(node.target))
            found.update(f"{type(module).__name__}({module.extra_repr()})\n".encode())
    return found.hexdigest()
