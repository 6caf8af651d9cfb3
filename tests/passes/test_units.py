"""Units under equations: what was joined disappears together, whatever is joined after it."""

import numpy as np
import pytest
import torch
from fxcompress.passes.channels.elements import joined
from fxcompress.passes.channels.units import NONE, Units
from hypothesis import given, settings
from hypothesis import strategies as st
from models import inputs
from pruning import Sequential, Wire, prune, shapes
from torch import nn

from fxcompress import trace


def rows(units, array):
    return [set(row) - {NONE} for row in units.resolve(array).tolist()]


def product(units, outer, inner):
    """Elements that carry one of ``outer`` units and one of ``inner`` units."""
    pairs = [np.repeat(units.fresh(outer), inner, 0), np.tile(units.fresh(inner), (outer, 1))]
    return np.concatenate(pairs, axis=1)


@st.composite
def equations(draw, size=12):
    """Pairs of arrays of 12 elements: channels, products, and concatenations of both."""
    units = Units()

    def array(left):
        kinds = ["channels", *(["product"] if left % 2 == 0 else []), *(["joined"] if left > 2 else [])]
        kind = draw(st.sampled_from(kinds))
        if kind == "channels":
            return units.fresh(left)
        if kind == "product":
            outer = draw(st.sampled_from([each for each in range(2, left + 1) if left % each == 0]))
            return product(units, outer, left // outer)
        first = draw(st.integers(1, left - 1))
        return joined([array(first), array(left - first)])

    arrays = [array(size) for _ in range(draw(st.integers(2, 4)))]
    pairs = st.tuples(st.sampled_from(range(len(arrays))), st.sampled_from(range(len(arrays))))
    return units, arrays, draw(st.lists(pairs, min_size=1, max_size=4))


@given(equations())
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_what_is_joined_carries_the_same_units(drawn):
    units, arrays, pairs = drawn
    for number, (i, j) in enumerate(pairs):
        units.join(arrays[i], arrays[j], cause=0)
        for a, b in pairs[: number + 1]:
            assert rows(units, arrays[a]) == rows(units, arrays[b])


def test_channels_beside_a_product_against_a_product():
    """Four channels, and two outputs of each: six of both in each of two groups."""
    units = Units()
    channels, kinds = units.fresh(4), units.fresh(2)
    outputs = np.concatenate([np.repeat(channels, 2, 0), np.tile(kinds, (4, 1))], axis=1)
    units.join(joined([channels, outputs]), product(units, 2, 6), cause=0)
    assert rows(units, outputs) == [set()] * 8


@pytest.mark.parametrize("grouped", [nn.GroupNorm(2, 12), nn.ConvTranspose2d(12, 12, 2, groups=2)])
def test_groups_over_an_image_and_what_a_depthwise_convolution_made_of_it(grouped):
    model = Sequential(
        stem=nn.Conv2d(3, 4, 1),
        dense=Wire(lambda m, x: torch.cat([x, m.wide(x).relu()], 1), wide=nn.Conv2d(4, 8, 3, padding=1, groups=4)),
        grouped=grouped,
        head=nn.Conv2d(12, 6, 1),
        last=nn.Conv2d(6, 3, 1),
    )
    report = trace(model.double().eval(), inputs(2, 3, 8, 8)).analyze("channels")
    assert not [group for group in report.groups if group.members[0].state.startswith(("stem", "dense"))]
    after = prune(model, inputs(2, 3, 8, 8))
    assert shapes(after)["dense.wide"] == (8, 1, 3, 3)
    assert shapes(after)["last"][1] == 3
