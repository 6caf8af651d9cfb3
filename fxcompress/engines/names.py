"""What the tensors of a file are called, and what runs it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Run = Callable[[Sequence[torch.Tensor]], list[Any]]
"""Runs a file on the tensors of a call; gives the tensors of the output."""

RunPieces = Callable[[Sequence[torch.Tensor], Mapping[str, torch.Tensor], Sequence[str]], dict[str, torch.Tensor]]
"""Computes some values of a file that is cut, of the tensors of a call and of what is to be read at each cut."""


@dataclass(frozen=True)
class Names:
    """Readable names of the tensors that go in and come out, in order, and of each input's dynamic dims."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dims: tuple[dict[int, str], ...]


@dataclass(frozen=True, eq=False)
class Pieces:
    """A file that is cut at some of its values: what reads one reads what it is given in its place.

    Attributes:
        reads: Name of a value at a cut or of an output -> the cuts that it is computed of.
        run: Computes such values.
    """

    reads: Mapping[str, frozenset[str]]
    run: RunPieces


def forced(name: str) -> str:
    """The name of what is given at a cut in the place of a value."""
    return f"{name}_forced"


def reads_of(
    operations: Iterable[tuple[Iterable[Hashable], Iterable[Hashable]]], cuts: Mapping[Hashable, str]
) -> dict[Hashable, frozenset[str]]:
    """Which cuts each value of a file is computed of.

    Args:
        operations: What each operation reads and gives, in execution order.
        cuts: What is given at a cut -> name of the cut.
    """
    found = {given: frozenset((name,)) for given, name in cuts.items()}
    for read, given in operations:
        of = frozenset[str]().union(*(found.get(value, frozenset()) for value in read))
        found |= {value: of for value in given if value not in cuts}
    return found
