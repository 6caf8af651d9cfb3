"""What the tensors of a file are called, and what runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Run = Callable[[Sequence[torch.Tensor]], list[Any]]
"""Runs a file on the tensors of a call; gives the tensors of the output."""

RunPieces = Callable[[Sequence[torch.Tensor], Mapping[str, torch.Tensor]], tuple[list[Any], Mapping[str, torch.Tensor]]]
"""Runs a file that is cut at some of its values, on the tensors of a call and what is to be read at each cut; gives the
tensors of the output and what is computed for each cut."""


@dataclass(frozen=True)
class Names:
    """Readable names of the tensors that go in and come out, in order, and of each input's dynamic dims."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dims: tuple[dict[int, str], ...]

    def with_cuts(self, forced: Mapping[str, str]) -> Names:
        """The names of a file that is cut at values: each is an output, and what is read in its place an input."""
        more = (name for name in forced if name not in self.outputs)
        return Names((*self.inputs, *forced.values()), (*self.outputs, *more), self.dims)


def pieces_of(run: Run, names: Names, found: Sequence[str]) -> RunPieces:
    """Sorts what a cut file gives, whose names are those of :meth:`Names.with_cuts`."""

    def run_pieces(
        tensors: Sequence[torch.Tensor], cuts: Mapping[str, torch.Tensor]
    ) -> tuple[list[Any], Mapping[str, torch.Tensor]]:
        results = run([*tensors, *(cuts[name] for name in found)])
        given = dict(
            zip((*names.outputs, *(name for name in found if name not in names.outputs)), results, strict=True)
        )
        return [given[name] for name in names.outputs], {name: given[name] for name in found}

    return run_pieces
