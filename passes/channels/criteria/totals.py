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

_PIECE = 1 << 18
"""Weights that fit in a cache together with what is computed from them."""


class Totals:
    """Adds up the scores of elements by the units that they carry."""

    def __init__(self, report: ChannelReport) -> None:
        self._units: list[Array] = []
        self._scores: list[Scores] = []
        self._dims = np.zeros(report.units.count + 1, np.int64)  # the last entry is that of NONE

    def add(self, carried: Array, scores: Scores) -> None:
        """Counts one dim: its elements' units and their scores."""
        for column in carried.T:
            self._units.append(column)
            self._scores.append(scores)
            self._dims[column] += 1  # once a unit, however many of the elements carry it

    def sum(self) -> Scores:
        """For each unit the sum over its elements; NaN where there is none."""
        dims = self._dims[:-1]
        if not self._units:
            return np.full(len(dims), np.nan)
        units, scores = np.concatenate(self._units), np.concatenate(self._scores)
        total = np.bincount(units - NONE, scores, len(self._dims))[1:]
        return np.where(dims > 0, total, np.nan)

    def mean(self) -> Scores:
        """For each unit the sum over its elements, divided by the number of dims; NaN where there is none."""
        return self.sum() / np.maximum(self._dims[:-1], 1)


def carried(report: ChannelReport, dim: Dim) -> Array:
    """The units that each element of a dim carries in the end, ``(size, k)``."""
    if len(dim) == 1 and not dim[0].is_position:
        return report.resolved(dim[0])
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

    Tensors of more than one dim are read in pieces that fit in a cache, once for all dims; pieces are added up in
    double precision.
    """
    count, *rest = tensors[0].shape
    single = torch.promote_types(tensors[0].dtype, torch.float32)
    if not rest:
        return {0: _real(each(*(tensor.detach().to(single) for tensor in tensors))).cpu().numpy().astype(np.float64)}
    size, wanted = math.prod(rest), set(dims)
    step = max(1, _PIECE // max(1, size))
    matrices = [tensor.detach().reshape(count, size) for tensor in tensors]
    first, others = np.zeros(count), np.zeros(size)
    for top in range(0, count, step):
        rows = slice(top, top + step)
        values = _real(each(*(matrix[rows].to(single) for matrix in matrices)))
        if 0 in wanted:
            first[rows] = values.sum(1).cpu().numpy()
        if wanted - {0}:
            others += values.sum(0).cpu().numpy()
    return {dim: _marginal(others.reshape(rest), dim - 1) if dim > 0 else first for dim in wanted}


def _real(values: torch.Tensor) -> torch.Tensor:
    """What a function makes of complex weights counts by its magnitude."""
    return values.abs() if values.is_complex() else values


def _marginal(values: Scores, dim: int) -> Scores:
    """Sums over all dims but one."""
    found: Scores = values.sum(tuple(other for other in range(values.ndim) if other != dim))
    return found
