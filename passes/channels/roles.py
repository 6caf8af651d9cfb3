"""What each dim of a parameter is for: which layers make channels, and which read them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from functools import cached_property

import torch
from fxcompress.passes.channels.groups import ChannelGroup, Member
from torch._ops import OpOverload

from fxcompress.ir.ops import operations
from fxcompress.ir.program import Program

aten = torch.ops.aten

_READ_DIM: Mapping[OpOverload, tuple[str, int]] = {
    aten.conv1d.default: ("weight", 1),
    aten.conv1d.padding: ("weight", 1),
    aten.conv2d.default: ("weight", 1),
    aten.conv2d.padding: ("weight", 1),
    aten.conv3d.default: ("weight", 1),
    aten.conv3d.padding: ("weight", 1),
    aten.conv_transpose1d.default: ("weight", 0),
    aten.conv_transpose2d.input: ("weight", 0),
    aten.conv_transpose3d.input: ("weight", 0),
    aten.linear.default: ("weight", 1),
}
"""Overload -> the dim of its weight that meets the channels of the input."""


class Roles:
    """The uses of a Program's state.

    Args:
        program: The Program.
    """

    def __init__(self, program: Program) -> None:
        self._root = program.graph_module

    @cached_property
    def _names(self) -> dict[str, list[str]]:
        """All names of the tensor that a name stands for."""
        names: dict[int, list[str]] = defaultdict(list)
        for name, tensor in (
            *self._root.named_parameters(remove_duplicate=False),
            *self._root.named_buffers(remove_duplicate=False),
        ):
            names[id(tensor)].append(name)
        return {name: alike for alike in names.values() for name in alike}

    @cached_property
    def _uses(self) -> dict[str, list[tuple[OpOverload, str]]]:
        """First name of a tensor -> the overloads that read it, each with the argument that it is."""
        uses: dict[str, list[tuple[OpOverload, str]]] = defaultdict(list)
        for call in operations(self._root):
            for argument, state in call.state.items():
                uses[self._names[state][0]].append((call.overload, argument))
        return uses

    def names(self, member: Member) -> list[str]:
        """All names of the tensor that a member is a dim of."""
        return self._names[member.state]

    def reads(self, member: Member) -> bool:
        """Whether a dim is only ever contracted with channels that another layer makes."""
        uses = self._uses[self._names[member.state][0]]
        return bool(uses) and all(_READ_DIM.get(overload) == (argument, member.dim) for overload, argument in uses)

    def makers(self, members: Sequence[Member]) -> Sequence[Member]:
        """The dims that make a group's channels; all of them where each only reads."""
        return [member for member in members if not self.reads(member)] or members

    def structure(self, group: ChannelGroup) -> Hashable:
        """Equal for groups that are built alike: the same operators use as many of their dims in the same places."""
        found: Counter[Hashable] = Counter()
        for member in group.members:
            uses = self._uses[self._names[member.state][0]]
            found[tuple(sorted((str(overload), argument, member.dim) for overload, argument in uses))] += 1
        return (group.factor, frozenset(found.items()))
