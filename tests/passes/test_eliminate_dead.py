"""eliminate-dead: what nothing reads goes, with the state that only it read."""

import torch
from fxcompress.passes.eliminate_dead import EliminateDead
from models import inputs, layer_kinds, run_pass, settled
from torch import nn

from fxcompress import trace
from fxcompress.ir.ops import set_state
from fxcompress.verification.numerics import compare


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 5)
        self.left = nn.Linear(5, 2)
        self.right = nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2))

    def forward(self, x):
        x = self.body(x).relu()
        return self.left(x), self.right(x)


def program_without_reader_of_right_head():
    program = trace(settled(TwoHeads()), inputs(3, 4))
    output = program.graph.output_node()
    left, _ = output.args[0]
    output.args = ((left, left),)
    program.graph_module.recompile()
    return program


def test_drops_unread_nodes_and_their_state(golden):
    before = program_without_reader_of_right_head()

    after, result = run_pass(EliminateDead(), before)

    assert result.changed
    assert result.statistics == {"nodes": 3, "state": 4}
    assert layer_kinds(after) == ["Linear", "Linear"]
    assert list(after.graph_module.state_dict()) == ["body.weight", "body.bias", "left.weight", "left.bias"]
    assert "right" not in dict(after.graph_module.named_modules())
    assert compare(before, after).exact
    golden("eliminate-dead-head", after.text())


def test_drops_state_that_no_node_reads():
    before = trace(settled(TwoHeads()), inputs(3, 4))
    set_state(before.graph_module, "spare.table", nn.Parameter(torch.ones(2)))

    after, result = run_pass(EliminateDead(), before)

    assert result.statistics == {"nodes": 0, "state": 1}
    assert "spare.table" not in after.graph_module.state_dict()


def test_keeps_every_name_of_a_tied_tensor_that_is_read():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(x)

    model = settled(Tied())
    before = trace(model, inputs(3, 4))

    after, result = run_pass(EliminateDead(), before)

    assert not result.changed
    assert set(after.graph_module.state_dict()) == {"embed.weight", "head.weight"}


def test_keeps_inputs_that_nothing_reads():
    class Ignores(nn.Module):
        def forward(self, x, y):
            return x * 2

    before = trace(Ignores(), (inputs(3, 4), inputs(3, 4)))

    after, result = run_pass(EliminateDead(), before)

    assert not result.changed
    assert sum(node.op == "placeholder" for node in after.nodes) == 2


def test_a_second_run_changes_nothing():
    once, _ = run_pass(EliminateDead(), program_without_reader_of_right_head())

    twice, result = run_pass(EliminateDead(), once)

    assert not result.changed
    assert twice.text() == once.text()


def test_leaves_the_program_before_as_it_was():
    before = program_without_reader_of_right_head()
    text, state = before.text(), list(before.graph_module.state_dict())

    run_pass(EliminateDead(), before)

    assert before.text() == text
    assert list(before.graph_module.state_dict()) == state
