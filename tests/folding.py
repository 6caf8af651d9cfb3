"""What the tests of fold-batchnorm share: the layers it folds into, and checks of what it did."""

from fxcompress.passes.fold_batchnorm import FoldBatchnorm
from models import layer_kinds, run_pass, settled
from torch import nn

from fxcompress import trace
from fxcompress.verification.numerics import compare

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
CONV_TRANSPOSE = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def check_folds(model, x, folded=1):
    """Folds every batch norm of a settled model, exactly; gives the Program after."""
    before = trace(settled(model), x)
    after, result = run_pass(FoldBatchnorm(), before)
    assert result.changed
    assert result.refusals == ()
    assert result.statistics == {"folded": folded}
    assert not any("BatchNorm" in kind for kind in layer_kinds(after))
    assert not any("running" in name for name in after.graph_module.state_dict())
    assert compare(before, after).max_rel_error < 1e-12
    return after


def check_refuses(model, x, code, node):
    """The pass leaves the Program alone, and says why."""
    before = trace(settled(model), x)
    after, result = run_pass(FoldBatchnorm(), before)
    assert not result.changed
    assert result.statistics == {"folded": 0}
    assert [(refusal.code, refusal.node) for refusal in result.refusals] == [(code, node)]
    assert after.text() == before.text()
    return result.refusals[0]
