"""Removal is exact on any network, for any choice of units.

Networks are drawn from a grammar of all supported structures (``grammar.py``), each of which takes part in some, and
several plans for each network: 600 pairs, always the same. To draw others, and more:

    FXCOMPRESS_EXAMPLES=20000 python -m pytest tests/properties/test_channel_removal.py
"""

import math
import os

import numpy as np
import pytest
from fxcompress.passes.channels.kept import kept_shapes
from fxcompress.passes.channels.removal import remove
from grammar import PRODUCTIONS, networks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import settled

from fxcompress import trace
from fxcompress.verification.oracle import check_removal
from fxcompress.verification.verifier import verify

ON_DEMAND = os.environ.get("FXCOMPRESS_EXAMPLES")
PLANS = 9 if ON_DEMAND else 5
TRIES = 50
NETWORKS = math.ceil(int(ON_DEMAND) / len(PRODUCTIONS) / PLANS) if ON_DEMAND else 3

pytestmark = pytest.mark.filterwarnings("ignore:The tensor attribute")  # of torch.export, about flat weights


def choose(report, rng):
    """Units to remove: some of some groups, of which at least one unit stays, as it has to of each dim.

    Where a slice takes a few units of a group alone, or elements carry units of two groups, a plan may leave nothing of
    a dim; such plans, which are refused, are rare.
    """
    for _ in range(TRIES):
        share = rng.uniform(0.2, 1)
        chosen = [group for group in report.groups if len(group) > 1 and rng.random() < share]
        removed = [rng.permutation(group.units)[: rng.integers(1, len(group))] for group in chosen]
        mask = report.removed_mask(np.concatenate([np.empty(0, np.int64), *removed]))
        if not list(report.survivors(mask).emptied()):
            return mask
    raise AssertionError(f"{TRIES} plans in a row leave nothing of a dim")


def check_plan(before, report, removed):
    after = before.copy()
    remove(after, report, removed)
    after.graph_module.recompile()
    verify(after)
    check_removal(before, after, kept_shapes(report, removed))


@pytest.mark.parametrize("production", PRODUCTIONS)
def test_any_plan_leaves_what_the_masked_network_computes(production):
    @settings(
        max_examples=NETWORKS, deadline=None, derandomize=not ON_DEMAND, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(networks(PRODUCTIONS[production]), st.integers(0, 2**32 - 1))
    def check(network, seed):
        model, x = network
        before = trace(settled(model), x)
        report = before.analyze("channels")
        assert not report.diagnostics
        rng = np.random.default_rng(seed)
        for _ in range(PLANS):
            check_plan(before, report, choose(report, rng))

    check()
