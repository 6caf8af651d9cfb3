"""From scores of elements (one index of one dim of one tensor) to scores of units."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from fxcompress.passes.channels.groups import ChannelReport
from fxcompress.passes.channels.layout import Dim
from fxcompress.passes.channels.units import NONE, Array
from torch import nn

from fxcompress.errors import InputError
from fxcompress.ir.program import Program

if TYPE_CHECKING:
    from fxcompress.passes.channels.criteria.registry import Evidence

Scores = npt.NDArray[np.float64]
Each = Callable[..., torch.Tensor]

_CHUNK = 1 << 18


class Totals:
    """Adds up the scores of elements by the units that they carry."""

    def __init__(self, report: ChannelReport) -> None:
        self._report = report
        self._units: list[Array] = []
        self._scores: list[Scores] = []
        self._dims = np.zeros(report.units.count, np.int64)

    def add(self, carried: Array, scores: Scores) -> None:
        """Counts one dim: its elements' units and their scores."""
        for column in carried.T:
            known = column != NONE
            self._units.append(column[known])
            self._scores.append(scores[known])
            self._dims[column[known]] += 1  # once a unit, however many of the elements carry it

    def mean(self) -> Scores:
        """For each unit the sum over its elements, divided by the number of dims; NaN where there is none."""
        if not self._units:
            return np.full(len(self._dims), np.nan)
        units, scores = np.concatenate(self._units), np.concatenate(self._scores)
        total = np.bincount(units, scores, len(self._dims))
        return np.where(self._dims > 0, total / np.maximum(self._dims, 1), np.nan)


def carried(report: ChannelReport, dim: Dim) -> Array:
    """The units that each element of a dim carries in the end, ``(size, k)``."""
    flat: Array = np.empty((1, 0), np.int64)
    for factor in dim:
        inner = np.empty((factor.size, 0), np.int64) if factor.units is None else report.resolved(factor)
        flat = np.concatenate([np.repeat(flat, len(inner), axis=0), np.tile(inner, (len(flat), 1))], axis=1)
    return flat


def parameters(program: Program, report: ChannelReport) -> Iterator[tuple[str, nn.Parameter, dict[int, Array]]]:
    """Each parameter that has removable elements, once: its name, itself, and dim -> units of its elements.

    Raises:
        InputError: The parameters have no values.
    """
    for name, parameter in program.graph_module.named_parameters():
        dims = {index: carried(report, dim) for index, dim in enumerate(report.state[name])}
        live = {index: units for index, units in dims.items() if units.shape[1]}
        if live:
            if parameter.is_meta:
                raise InputError(
                    f"{name} is on the meta device and has no values to compare; plan with criterion=random, "
                    "or load the weights first"
                )
            yield name, parameter, live


def by_weight(evidence: Evidence, each: Each) -> Scores:
    """Scores by a sum over each unit's weights.

    Args:
        evidence: The Program and its units.
        each: Gives the score of every weight of a tensor.
    """
    totals = Totals(evidence.report)
    for _, parameter, dims in parameters(evidence.program, evidence.report):
        for dim, scores in marginals(each, dims, parameter).items():
            totals.add(dims[dim], scores)
    return totals.mean()


def marginals(each: Each, dims: Iterable[int], *tensors: torch.Tensor) -> dict[int, Scores]:
    """Sums, for each of some dims over all the others, of what a function makes of tensors of one shape.

    The tensors are read in pieces that fit in a cache, once for all dims, and summed in double precision.
    """
    shape = tensors[0].shape
    wanted = {dim: torch.zeros(shape[dim], dtype=torch.float64) for dim in dims}
    rows = max(1, _CHUNK // max(1, math.prod(shape[1:])))
    pieces = zip(*(torch.split(tensor.detach(), rows) for tensor in tensors), strict=True)
    for number, piece in enumerate(pieces):
        values = each(*(tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in piece))
        for dim, sums in wanted.items():
            found = _marginal(values, dim).cpu().double()
            if dim == 0:
                sums[number * rows :][: len(found)] = found
            else:
                sums += found
    return {dim: sums.numpy() for dim, sums in wanted.items()}


def _marginal(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Sums over all dims but one: first those before it, then those after it, which torch does fastest."""
    if dim > 0:
        values = values.flatten(0, dim - 1).sum(0)
    return values.reshape(len(values), -1).sum(1)
