"""fold-constants: what depends on no input and no trainable or saved state is computed once."""

import pytest
import torch
from fxcompress.passes.fold_constants import FoldConstants
from models import inputs, run_pass, settled
from torch import nn

from fxcompress import trace
from fxcompress.verification.numerics import compare

aten = torch.ops.aten


class Scaled(nn.Module):
    """Adds a table that is computed from a buffer; ``persistent`` and ``trained`` say what kind of state it is."""

    def __init__(self, persistent=False, trained=False):
        super().__init__()
        table = torch.arange(4, dtype=torch.float64)
        if trained:
            self.table = nn.Parameter(table)
        else:
            self.register_buffer("table", table, persistent=persistent)

    def forward(self, x):
        return x + (self.table * 2).exp()


def unfolded(model):
    """A Program whose constants are still computed: tracing folds, so the buffer is made a constant afterwards."""
    program = trace(model, inputs(3, 4))
    program.graph_module._non_persistent_buffers_set.add("table")
    return program


def targets(program):
    return [node.target for node in program.nodes if node.op == "call_function"]


def test_folds_a_chain_into_one_constant(golden):
    before = unfolded(Scaled(persistent=True))
    assert targets(before) == [aten.mul.Tensor, aten.exp.default, aten.add.Tensor]

    after, result = run_pass(FoldConstants(), before)

    assert result.changed
    assert result.statistics == {"folded": 1}
    assert targets(after) == [aten.add.Tensor]
    assert compare(before, after).exact
    assert [name for name, _ in after.graph_module.named_buffers()] == ["constants.exp"]
    assert after.graph_module.state_dict() == {}, "constants are not saved with the model"
    golden("fold-constants-chain", after.text())


@pytest.mark.parametrize("kind", [{"persistent": True}, {"trained": True}])
def test_leaves_what_depends_on_saved_or_trained_state(kind):
    before = trace(Scaled(**kind), inputs(3, 4))

    after, result = run_pass(FoldConstants(), before)

    assert not result.changed
    assert targets(after) == targets(before)


def test_leaves_random_operations():
    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.rand(4, dtype=torch.float64)

    before = trace(Noise(), inputs(3, 4))

    after, result = run_pass(FoldConstants(), before)

    assert not result.changed
    assert aten.rand.default in targets(after)


def test_leaves_an_expansion_and_folds_its_source():
    class Expands(Scaled):
        def forward(self, x):
            return x * (self.table + 1).expand(3, 4)

    before = trace(settled(Expands(persistent=True)), inputs(3, 4), batch_dim=None)
    before.graph_module._non_persistent_buffers_set.add("table")

    after, result = run_pass(FoldConstants(), before)

    assert result.statistics == {"folded": 1}
    assert targets(after) == [aten.expand.default, aten.mul.Tensor]


def test_a_constant_read_twice_is_made_once():
    class Twice(Scaled):
        def forward(self, x):
            table = self.table * 3
            return x + table, x - table

    after, result = run_pass(FoldConstants(), unfolded(Twice(persistent=True)))

    assert result.statistics == {"folded": 1}
    assert len(list(after.graph_module.named_buffers())) == 1


def test_a_second_run_changes_nothing():
    once, _ = run_pass(FoldConstants(), unfolded(Scaled(persistent=True)))

    twice, result = run_pass(FoldConstants(), once)

    assert not result.changed
    assert twice.text() == once.text()


def test_does_nothing_on_the_meta_device():
    model = Scaled(persistent=True).to("meta")
    program = trace(model, torch.empty(3, 4, device="meta", dtype=torch.float64))
    program.graph_module._non_persistent_buffers_set.add("table")

    after, result = run_pass(FoldConstants(), program)

    assert not result.changed
    assert targets(after) == targets(program)
