"""Importance criteria: how much a model would miss each unit.

One registry, by name. A criterion gives every unit a score over all the dims that go with it (its group), so that a
channel's filters, its normalization and its readers count together.
"""

from fxcompress.passes.channels.criteria import activations, gradients, outputs, weights
from fxcompress.passes.channels.criteria.registry import Criterion, Evidence, criterion, criterion_of, names

__all__ = [
    "Criterion",
    "Evidence",
    "activations",
    "criterion",
    "criterion_of",
    "gradients",
    "names",
    "outputs",
    "weights",
]
