"""Patterns of parameter names, and which channel groups they mean."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from fxcompress.passes.channels.groups import ChannelGroup, ChannelReport
from fxcompress.passes.channels.roles import Roles

from fxcompress.errors import InputError, did_you_mean


class Patterns:
    """Shell-style patterns, matched against the parameters that make a group's channels.

    ``layer4.*``, or ``layer4``, means the groups whose channels a layer in ``layer4`` makes, and not those that it only
    reads. A pattern with a dim, ``fc.weight:1``, means the group that the dim belongs to, whatever it is there.

    Args:
        option: Name of the option that gives the patterns, for messages.
        patterns: The patterns; the first that matches wins.
        report: The channel dependencies.
        roles: Which dims make and which read channels.

    Raises:
        InputError: A pattern matches no group; near names are given.
    """

    def __init__(self, option: str, patterns: Iterable[str], report: ChannelReport, roles: Roles) -> None:
        self._patterns = tuple(patterns)
        self._names = [_names(group, roles) for group in report.groups] if self._patterns else []
        for pattern in self._patterns:
            if not any(_matches(pattern, names) for names in self._names):
                raise _unmatched(option, pattern, report, self._names)

    def first(self, number: int) -> str | None:
        """The first pattern that matches a group, given by its number."""
        return next((pattern for pattern in self._patterns if _matches(pattern, self._names[number])), None)


def _names(group: ChannelGroup, roles: Roles) -> list[str]:
    """What patterns may match: names of the parameters that make the channels, and all dims."""
    makers = roles.makers(group.members)
    dims = [f"{name}:{member.dim}" for member in group.members for name in roles.names(member)]
    return [*(name for member in makers for name in roles.names(member)), *dims]


def _matches(pattern: str, names: Iterable[str]) -> bool:
    return any((":" in name) == (":" in pattern) and _covers(pattern, name) for name in names)


def _covers(pattern: str, name: str) -> bool:
    """Whether a pattern means a parameter by its name, or by that of a module it is in."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _unmatched(option: str, pattern: str, report: ChannelReport, names: Sequence[Sequence[str]]) -> InputError:
    read = [name for group in names for name in group if ":" in name and _covers(pattern, name.rpartition(":")[0])]
    if read:
        return InputError(
            f"the pattern {pattern!r} in {option} matches parameters that make no removable channels and only read "
            f'those of others; to mean what they read, give {option} "{read[0]}", with the dim'
        )
    if any(_covers(pattern, name) for name in report.state):
        return InputError(
            f"the pattern {pattern!r} in {option} matches only parameters that nothing can be removed from; "
            "ChannelPlan.explain says why"
        )
    known = {name for group in names for name in group}
    layers = {name.rpartition(".")[0] for name in known}
    return InputError(
        f"the pattern {pattern!r} in {option} matches no parameter{did_you_mean(pattern, known | layers)}"
    )
