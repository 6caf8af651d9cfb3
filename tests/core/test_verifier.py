"""Each rule of the normal form, with a planted violation that it must catch."""

import operator

import pytest
import torch
from torch import nn
from toys import toy_program

from fxcompress.errors import VerificationError
from fxcompress.ir.ops import set_state
from fxcompress.verification.verifier import RULES, verify, violations

aten = torch.ops.aten


def node_named(program, name):
    return next(node for node in program.nodes if node.name == name)


def after_relu(program, target, args=(), kwargs=None):
    """Inserts a call on the ReLU's output, in the place of it."""
    relu = node_named(program, "relu")
    with program.graph.inserting_after(relu):
        call = program.graph.call_function(target, (relu, *args), kwargs)
    call.meta = dict(relu.meta)
    relu.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)
    return call


def plant_undefined_use(program):
    relu, first = node_named(program, "relu"), next(n for n in program.nodes if n.op == "call_module")
    first.args = (relu,)


def plant_method_call(program):
    relu = node_named(program, "relu")
    with program.graph.inserting_after(relu):
        program.graph.call_method("relu", (relu,)).meta = dict(relu.meta)


def plant_python_function(program):
    after_relu(program, torch.nn.functional.relu)


def plant_user_module(program):
    class Mine(nn.Module):
        def forward(self, x):
            return x

    program.graph_module.add_module("mine", Mine().eval())
    relu = node_named(program, "relu")
    with program.graph.inserting_after(relu):
        program.graph.call_module("mine", (relu,)).meta = dict(relu.meta)


def plant_keyword_operand(program):
    node = next(n for n in program.nodes if n.op == "call_module")
    node.kwargs, node.args = {"input": node.args[0]}, ()


def plant_mutation(program):
    after_relu(program, aten.relu_.default)


def plant_assertion(program):
    relu = node_named(program, "relu")
    with program.graph.inserting_after(relu):
        program.graph.call_function(aten._assert_async.default, (relu,)).meta["val"] = None


def plant_unknown_value(program):
    del node_named(program, "relu").meta["val"]


def plant_real_value(program):
    node_named(program, "relu").meta["val"] = torch.zeros(3, 5)


def plant_read_of_nothing(program):
    relu = node_named(program, "relu")
    with program.graph.inserting_after(relu):
        read = program.graph.create_node("get_attr", "0.nothing")
        read.meta = dict(relu.meta)


def plant_stale_state_shape(program):
    relu = node_named(program, "relu")
    set_state(program.graph_module, "scale", nn.Parameter(torch.ones(4)))
    with program.graph.inserting_before(relu):
        read = program.graph.get_attr("scale")
    read.meta = dict(relu.meta)


def plant_orphan(program):
    set_state(program.graph_module, "left.behind", nn.Parameter(torch.ones(2)))


def plant_attribute_lie(program):
    program.graph_module.get_submodule("0").out_features = 7


def plant_nested_output(program):
    output = program.graph.output_node()
    output.args = ([output.args[0][0]],)


def plant_missing_output(program):
    program.graph.output_node().args = ((),)


def plant_extra_input(program):
    first = next(iter(program.nodes))
    with program.graph.inserting_before(first):
        program.graph.placeholder("uninvited").meta = dict(first.meta)


def plant_training_mode(program):
    program.graph_module.get_submodule("2").train()


PLANTED = [
    ("well-formed", plant_undefined_use),
    ("known-operations", plant_method_call),
    ("known-operations", plant_python_function),
    ("standard-modules", plant_user_module),
    ("standard-modules", plant_keyword_operand),
    ("no-mutation", plant_mutation),
    ("no-assertions", plant_assertion),
    ("values-known", plant_unknown_value),
    ("values-known", plant_real_value),
    ("state-resolves", plant_read_of_nothing),
    ("state-resolves", plant_stale_state_shape),
    ("no-orphans", plant_orphan),
    ("attributes-agree", plant_attribute_lie),
    ("interface-agrees", plant_nested_output),
    ("interface-agrees", plant_missing_output),
    ("interface-agrees", plant_extra_input),
    ("inference-mode", plant_training_mode),
]


def test_a_traced_program_is_in_normal_form():
    assert list(violations(toy_program())) == []


@pytest.mark.parametrize(("rule", "plant"), PLANTED, ids=[plant.__name__ for _, plant in PLANTED])
def test_each_planted_bug_is_caught_by_its_rule(rule, plant):
    program = toy_program()
    plant(program)
    assert any(found.startswith(f"{rule}: ") for found in violations(program)), list(violations(program))
    with pytest.raises(VerificationError, match="not in normal form"):
        verify(program)


def test_every_rule_has_a_planted_bug():
    assert set(RULES) == {rule for rule, _ in PLANTED}


def test_size_arithmetic_is_allowed():
    program = toy_program()
    relu = node_named(program, "relu")
    with program.graph.inserting_after(relu):
        rows = program.graph.call_function(aten.sym_size.int, (relu, 0))
        rows.meta["val"] = relu.meta["val"].shape[0]
    with program.graph.inserting_after(rows):
        twice = program.graph.call_function(operator.mul, (rows, 2))
        twice.meta["val"] = relu.meta["val"].shape[0] * 2
    assert list(violations(program)) == []


@pytest.mark.parametrize("plant", [plant_orphan, plant_unknown_value])
def test_the_message_names_the_thing(plant):
    program = toy_program()
    plant(program)
    name = "left.behind" if plant is plant_orphan else "relu"
    with pytest.raises(VerificationError, match=name):
        verify(program)
