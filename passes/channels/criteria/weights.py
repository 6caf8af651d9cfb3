"""Criteria that read the weights alone."""

from __future__ import annotations

import numpy as np
import torch
from fxcompress.passes.channels.criteria.registry import Evidence, criterion
from fxcompress.passes.channels.criteria.totals import Scores, Totals, by_weight, parameters
from fxcompress.passes.channels.groups import Member
from fxcompress.passes.channels.roles import Roles

from fxcompress.errors import InputError
from fxcompress.ir.ops import operations

aten = torch.ops.aten

_ROWS = 512


@criterion("l1")
def l1(evidence: Evidence) -> Scores:
    """Sum of absolute weights (Li et al. 2017, arXiv:1608.08710)."""
    return by_weight(evidence, torch.abs)


@criterion("l2")
def l2(evidence: Evidence) -> Scores:
    """Sum of squared weights (Li et al. 2017, arXiv:1608.08710, with the square of the norm)."""
    return by_weight(evidence, torch.square)


@criterion("lamp", scale="model")
def lamp(evidence: Evidence) -> Scores:
    """Squared weights relative to those of all units of the group that are no smaller (LAMP, arXiv:2010.07611)."""
    scores = l2(evidence)
    for group in evidence.report.groups:
        order = np.argsort(scores[group.units], kind="stable")
        ascending = scores[group.units][order]
        rest = np.cumsum(ascending[::-1])[::-1]
        scores[group.units[order]] = np.divide(ascending, rest, out=np.ones_like(rest), where=rest > 0)
    return scores


@criterion("bn-gamma", scale="model")
def bn_gamma(evidence: Evidence) -> Scores:
    """Absolute scale of the batch normalization after a channel (network slimming, arXiv:1708.06519).

    Raises:
        InputError: No batch normalization with a scale is left.
    """
    scales = {
        call.state["weight"]
        for call in operations(evidence.program.graph_module)
        if call.overload is aten.batch_norm.default and "weight" in call.state
    }
    if not scales:
        raise InputError(
            "criterion=bn-gamma needs batch normalizations with a scale, and the model has none; "
            "select channels before fold-batchnorm, or take another criterion"
        )
    totals = Totals(evidence.report)
    for name, parameter, dims in parameters(evidence.program, evidence.report):
        if name in scales:
            totals.add(dims[0], parameter.detach().abs().cpu().double().numpy())
    return totals.mean()


@criterion("fpgm")
def fpgm(evidence: Evidence) -> Scores:
    """Distance of a filter to all others: those near the geometric median are redundant (FPGM, arXiv:1811.00250)."""
    totals, roles = Totals(evidence.report), Roles(evidence.program)
    for name, parameter, dims in parameters(evidence.program, evidence.report):
        for dim, units in dims.items():
            if parameter.dim() >= 2 and not roles.reads(Member(name, dim)):
                totals.add(units, _distances(parameter.detach(), dim))
    return totals.mean()


def _distances(weight: torch.Tensor, dim: int) -> Scores:
    """For each index of a dim the sum of the Euclidean distances from its slice to all others'."""
    weight = torch.view_as_real(weight) if weight.is_complex() else weight
    filters = weight.movedim(dim, 0).reshape(weight.shape[dim], -1)
    filters = filters.to(torch.promote_types(filters.dtype, torch.float32))
    sums = [torch.cdist(rows, filters).double().sum(1) for rows in torch.split(filters, _ROWS)]
    found: Scores = torch.cat(sums).cpu().numpy()
    return found


@criterion("random", scale="model")
def random(evidence: Evidence) -> Scores:
    """A random order, the same for the same seed: the baseline that a criterion has to beat."""
    return np.random.default_rng(evidence.seed).random(evidence.report.units.count)
