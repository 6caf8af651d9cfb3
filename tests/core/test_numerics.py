"""The numeric check: what it lets pass, and planted bugs that it catches."""

import math

import pytest
import torch
from torch import nn
from toys import put_weight, toy_program, weight

import fxcompress as fxc
from fxcompress.errors import VerificationError
from fxcompress.ir.ops import set_state
from fxcompress.verification.numerics import (
    check_against_model,
    check_exact,
    compare,
    compare_outputs,
    rounding_tolerance,
)
from fxcompress.verification.verifier import violations
from fxcompress.verification.widened import widened

aten = torch.ops.aten


def test_a_program_equals_itself_bit_for_bit():
    program = toy_program()
    found = check_exact(program, program.copy(), lambda other: None)
    assert found.exact
    assert found.max_abs_error == 0.0
    assert found.sqnr_db == math.inf


def test_lossy_error_is_measured():
    before, after = toy_program(), toy_program()
    put_weight(after, 1.01)
    found = compare(before, after)
    assert not found.exact
    assert 1e-4 < found.max_rel_error < 0.1
    assert 20 < found.sqnr_db < 60


def scale_weight(factor):
    return lambda program: put_weight(program, factor)


def checked(rewrite):
    """Runs a rewrite on a toy Program and checks it as exact."""
    before = toy_program()
    after = before.copy()
    rewrite(after)
    after.graph_module.recompile()
    return check_exact(before, after, rewrite)


@pytest.mark.parametrize("factor", [1 + 1e-7, 1 + 1e-6, 0.999, 2.0])
def test_a_moved_scale_is_not_exact_however_small(factor):
    with pytest.raises(VerificationError, match="must be exact"):
        checked(scale_weight(factor))


def move_scale_into_weight(program):
    """``W2 relu(W1 x + b1)`` as ``(W2 / 3) relu(3 W1 x + 3 b1)``: exact, but for the rounding of the weights."""
    put_weight(program, 3.0, "0.weight")
    put_weight(program, 3.0, "0.bias")
    put_weight(program, 1 / 3, "2.weight")


def test_rounding_of_rewritten_weights_is_exact():
    found = checked(move_scale_into_weight)
    assert not found.exact
    assert found.max_rel_error < 1e-6


def test_a_rewrite_that_is_right_in_float64_but_stores_garbage_is_caught():
    def rewrite(program):
        put_weight(program, 1.0 if weight(program).dtype is torch.float64 else 1.001)

    with pytest.raises(VerificationError, match="rounding the weights"):
        checked(rewrite)


def test_a_bug_that_shows_at_another_batch_only_is_caught():
    before, after = toy_program(), toy_program()
    relu = next(n for n in after.nodes if n.name == "relu")
    with after.graph.inserting_after(relu):
        fixed = after.graph.call_function(aten.reshape.default, (relu, [3, 5]))
    fixed.meta = dict(relu.meta)
    relu.replace_all_uses_with(fixed, delete_user_cb=lambda user: user is not fixed)
    after.graph_module.recompile()
    with pytest.raises(RuntimeError, match="shape"):
        compare(before, after)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_nan_and_inf_are_caught(poison):
    before, after = toy_program(), toy_program()
    bias = weight(after, "2.bias").detach().clone()
    bias[1] = poison
    set_state(after.graph_module, "2.bias", nn.Parameter(bias))
    with pytest.raises(VerificationError, match="NaN or Inf"):
        compare(before, after)


def test_masks_of_minus_infinity_compare_equal():
    mask = torch.tensor([0.0, -math.inf])
    assert compare_outputs([mask], [mask.clone()]).exact
    nearly = compare_outputs([torch.tensor([1.0, -math.inf])], [torch.tensor([1.0 + 1e-6, -math.inf])])
    assert 0 < nearly.max_rel_error < 1e-5


def test_errors_are_relative_to_all_values_also_to_those_that_agree():
    found = compare_outputs([torch.tensor([10.0, 0.1, -math.inf])], [torch.tensor([10.0, 0.2, -math.inf])])
    assert found.max_rel_error == pytest.approx(0.01)
    assert found.sqnr_db == pytest.approx(40, abs=0.01)


@pytest.mark.parametrize(
    ("expected", "found", "message"),
    [
        ([torch.zeros(2)], [torch.zeros(3)], r"\(3,\) where .* \(2,\)"),
        ([torch.zeros(2)], [torch.zeros(2).double()], "float64"),
        ([torch.zeros(2)], [], "0 outputs where 1"),
        ([torch.tensor([1, 2])], [torch.tensor([1, 3])], "1 of 2 elements"),
        ([3], [4], "4 where 3"),
        ([True], [1], "1 where True"),
    ],
)
def test_structure_shape_dtype_and_integers_must_agree(expected, found, message):
    with pytest.raises(VerificationError, match=message):
        compare_outputs(expected, found)


def test_reference_of_zeros_gives_an_infinite_relative_error():
    assert compare_outputs([torch.zeros(2)], [torch.ones(2)]).max_rel_error == math.inf


def test_rounding_tolerance_stays_meaningful_in_low_precision():
    assert rounding_tolerance([torch.zeros(1)]) < 1e-5
    assert rounding_tolerance([torch.zeros(1, dtype=torch.bfloat16)]) <= 0.02
    assert rounding_tolerance([torch.zeros(1, dtype=torch.int64)]) == 0.0


def test_widening_reaches_weights_literals_and_constants():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x):
            y = torch.softmax(self.norm(self.linear(x)), -1, dtype=torch.float32)
            return y + torch.arange(4, dtype=torch.float32)

    program = fxc.trace(Mixed(), torch.randn(2, 4))
    wide = widened(program)
    (output,) = wide.graph_module(*wide.interface.leaves)
    assert output.dtype is torch.float64
    assert torch.allclose(output.float(), program(*program.interface.args), atol=1e-6)
    assert list(violations(wide)) == []
    assert {tensor.dtype for tensor in program.graph_module.parameters()} == {torch.float32}


class Rows(nn.Module):
    """Counts the rows it computes."""

    def __init__(self, mix=lambda y: y):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.mix = mix
        self.seen = []

    def forward(self, x):
        if not torch.compiler.is_exporting():
            self.seen.append(len(x))
        return self.mix(self.linear(x))


def against_itself(model, rows, rewrite=lambda program: None):
    """Traces a model, plants a bug and compares the two; gives the batches that the model ran at meanwhile."""
    x = torch.randn(rows, 4)
    program = fxc.trace(model, x)
    rewrite(program)
    program.graph_module.recompile()
    reference = model(x)
    del model.seen[:]
    check_against_model(program, model, reference)
    return model.seen


def test_rows_of_the_reference_serve_for_the_other_batch():
    assert against_itself(Rows(), 2) == []
    assert against_itself(Rows(), 1) == []
    assert against_itself(Rows(), 50) == []


def test_the_model_runs_again_where_it_mixes_rows():
    assert against_itself(Rows(lambda y: y - y.mean(0)), 2) == [3]
    assert against_itself(Rows(lambda y: y - y.mean(0)), 50) == [2]


def test_a_graph_that_needs_two_rows_is_checked_at_three():
    assert against_itself(Rows(lambda y: y + y.index_select(0, torch.tensor([1]))), 2) == [3]


def after(program, call, *args):
    """Puts one more operation behind the output."""
    output = program.graph.output_node()
    (result,) = output.args[0]
    with program.graph.inserting_before(output):
        planted = program.graph.call_function(call, (result, *args))
    planted.meta = dict(result.meta)
    output.args = ((planted,),)


@pytest.mark.parametrize(
    ("rows", "plant"),
    [
        (2, lambda program: after(program, aten.reshape.default, [2, 3])),
        (50, lambda program: after(program, aten.reshape.default, [50, 3])),
        (2, lambda program: after(program, aten.mul.Tensor, 1.001)),
        (50, lambda program: after(program, aten.mul.Tensor, 1.001)),
        (2, lambda program: after(program, aten.flip.default, [0])),
        (1, lambda program: after(program, aten.sum.dim_IntList, [0], True)),
        (2, lambda program: put_weight(program, 1.001, "linear.bias")),
    ],
)
def test_a_program_that_differs_from_its_model_is_caught(rows, plant):
    with pytest.raises((VerificationError, RuntimeError), match=r"differs from Rows|shape|output 0 is"):
        against_itself(Rows(), rows, plant)
