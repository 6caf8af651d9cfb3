"""Plans: which units to remove from a Program, as data that can be read, kept, sent and applied later."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fxcompress.passes.channels.groups import ChannelReport
from fxcompress.passes.channels.units import Array, Mask
from tabulate import tabulate

from fxcompress.errors import InputError
from fxcompress.ir.program import Program

FORMAT = 1


@dataclass(frozen=True)
class Removal:
    """What goes from one group.

    Attributes:
        group: Number of the group in the channels report.
        name: Its first member, ``parameter:dim``.
        factor: ``whole``, ``outer`` or ``inner``, as in the report.
        size: Units of the group.
        removed: Places of those that go, within the group.
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
        notes: What could not be chosen, and why.
    """

    model: str
    removals: tuple[Removal, ...]
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        gone = sum(len(removal.removed) for removal in self.removals)
        return f"ChannelPlan(removes {gone} units from {len(self.removals)} groups)"

    def explain(self) -> str:
        """A table of what goes, from where and why, and what stays and why."""
        rows = [
            (r.name, r.factor, f"{len(r.removed)} of {r.size}", len(r.members), r.reason or "-") for r in self.removals
        ]
        table = tabulate(rows, ["group", "factor", "removed", "dims", "why"])
        return "\n".join([table, *self.notes])

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> ChannelPlan:
        """Reads what :meth:`to_json` wrote.

        Raises:
            InputError: The text is no plan.
        """
        try:
            data = json.loads(text)
            if data["format"] != FORMAT:
                raise InputError(f"the plan has format {data['format']}; this version reads {FORMAT}")
            return cls(str(data["model"]), tuple(_removal(entry) for entry in data["removals"]), tuple(data["notes"]))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"this is no channel plan: {error!r}; write one with ChannelPlan.to_json") from error

    def mask(self, program: Program, report: ChannelReport) -> Mask:
        """The units to remove, for the report of the Program that the plan is for.

        Raises:
            InputError: The plan is for a Program of another structure, or its numbers do not fit the groups.
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
        return mask


def _units(report: ChannelReport, removal: Removal) -> Array:
    if not 0 <= removal.group < len(report.groups):
        raise InputError(
            f"the plan names group {removal.group} ({removal.name}), but the model has {len(report.groups)} groups; "
            "run select-channels on it"
        )
    units = report.groups[removal.group].units
    outside = [place for place in removal.removed if not 0 <= place < len(units)]
    if outside:
        raise InputError(
            f"the plan removes unit {outside[0]} of group {removal.name}, which has units 0 to {len(units) - 1}"
        )
    if len(set(removal.removed)) == len(units):
        raise InputError(f"the plan removes all {len(units)} units of group {removal.name}; leave at least one")
    return units[list(removal.removed)]


def _removal(entry: Mapping[str, Any]) -> Removal:
    given = {**entry, "removed": tuple(map(int, entry["removed"])), "members": tuple(map(str, entry["members"]))}
    return Removal(**given)


def digest(program: Program) -> str:
    """A digest of a Program's structure: graph, shapes and names, not the weights' values."""
    shapes = [f"{name}{tuple(tensor.shape)}" for name, tensor in program.graph_module.named_parameters()]
    shapes += [f"{name}{tuple(tensor.shape)}" for name, tensor in program.graph_module.named_buffers()]
    return hashlib.sha256("\n".join([*map(_line, program.nodes), *shapes]).encode()).hexdigest()


def _line(node: Any) -> str:
    return f"{node.name} {node.op} {node.target} {node.args} {node.kwargs}"
