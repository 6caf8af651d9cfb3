"""The manager leaves its input alone, believes no pass, and says which pass failed."""

import pytest
import torch
from toys import (
    TOYS,
    ClaimChange,
    CountNodes,
    HideChange,
    InterruptMidway,
    Nothing,
    RaiseMidway,
    ReturnNothing,
    Scale,
    SwapActivation,
    WeightNorm,
    WriteInPlace,
    WritingAnalysis,
    toy_program,
    weight,
)

from fxcompress import registry
from fxcompress.errors import InputError, VerificationError
from fxcompress.manager.bisect import bisect
from fxcompress.manager.fingerprint import checksums, difference, fingerprint
from fxcompress.manager.pass_manager import PassManager
from fxcompress.pass_base import PassResult


@pytest.fixture(autouse=True)
def known_passes(monkeypatch):
    monkeypatch.setattr(registry, "BUILT_IN", {})
    monkeypatch.setattr(registry, "_registered", {cls.name: cls for cls in TOYS})


@pytest.fixture
def program():
    return toy_program()


@pytest.fixture
def untouched(program):
    """Fails the test if the input Program is not what it was."""
    before, weights, cached = fingerprint(program), checksums(program), dict(program._analyses)
    yield program
    assert difference(before, fingerprint(program)) is None
    assert checksums(program) == weights
    assert program._analyses == cached


def test_passes_run_in_order_on_a_copy(untouched):
    result = PassManager("count-nodes,scale{factor=3},scale{factor=0.5}").run(untouched)
    assert torch.equal(weight(result.program), weight(untouched) * 3 * 0.5)
    assert result.before is untouched
    assert [(record.index, record.text, record.changed) for record in result.records] == [
        (1, "count-nodes", False),
        (2, "scale{factor=3.0}", True),
        (3, "scale{factor=0.5}", True),
    ]
    assert result.records[0].value == 5
    assert result.records[0].result is None
    assert result.records[1].result == PassResult(changed=True, statistics={"scaled": 1})


def test_text_and_passes_make_the_same_manager():
    assert PassManager("scale,nothing").pipeline == PassManager([Scale(), Nothing()]).pipeline


def test_the_input_is_never_the_result(untouched):
    result = PassManager("nothing").run(untouched)
    assert result.program is not untouched
    assert difference(fingerprint(untouched), fingerprint(result.program)) is None


def test_edited_graphs_are_recompiled(untouched):
    result = PassManager([SwapActivation()]).run(untouched)
    x = torch.randn(2, 6)
    w0, b0, w2, b2 = (weight(untouched, name) for name in ("0.weight", "0.bias", "2.weight", "2.bias"))
    assert torch.allclose(result.program(x), torch.sigmoid(x @ w0.T + b0) @ w2.T + b2)


def test_analyses_are_dropped_unless_preserved(untouched, monkeypatch):
    runs: list[str] = []
    monkeypatch.setattr(CountNodes, "runs", runs)
    monkeypatch.setattr(WeightNorm, "runs", runs)
    result = PassManager("weight-norm,nothing,scale,nothing").run(untouched)
    assert runs == ["count-nodes", "weight-norm", "weight-norm"]  # scale preserves count-nodes only
    norms = result.program.analyze("weight-norm")
    assert norms[0].item() == pytest.approx(2 * result.records[0].value[0].item())
    assert len(runs) == 3


def test_an_unchanged_program_keeps_its_analyses(untouched, monkeypatch):
    runs: list[str] = []
    monkeypatch.setattr(WeightNorm, "runs", runs)
    PassManager("weight-norm,scale{factor=1},weight-norm").run(untouched)
    assert runs == ["weight-norm"]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (
            HideChange(),
            "'hide-change' says that it changed nothing, but tensor '0.weight' is different; return changed=True",
        ),
        (ClaimChange(), "'claim-change' says that it changed the Program, but did not; return changed=False"),
        (ReturnNothing(), "'return-nothing' returned None; a transform returns a PassResult"),
        (WritingAnalysis(), "the analysis 'writing-analysis' changed the Program (tensor '0.weight' is different)"),
    ],
)
def test_a_pass_that_lies_is_caught_without_any_instrument(untouched, item, message):
    with pytest.raises(VerificationError) as caught:
        PassManager([Scale(), item], instruments=[]).run(untouched)
    assert message in str(caught.value)
    assert caught.value.__notes__ == [f"in pass 2 of 2: {item}"]


def test_a_write_into_a_shared_tensor_is_caught(program):
    with pytest.raises(VerificationError, match=r"'write-in-place' wrote into .* \(tensor '0.weight' is different\)"):
        PassManager([WriteInPlace()], instruments=[]).run(program)


def test_a_pass_that_raises_leaves_everything_as_it_was(untouched):
    with pytest.raises(ValueError, match="half way") as caught:
        PassManager([Scale(), RaiseMidway()]).run(untouched)
    assert caught.value.__notes__ == ["in pass 2 of 2: raise-midway"]


def test_an_interrupt_leaves_everything_as_it_was(untouched):
    with pytest.raises(KeyboardInterrupt):
        PassManager([Scale(), InterruptMidway()]).run(untouched)


def test_required_analyses_must_exist(monkeypatch):
    monkeypatch.setattr(Nothing, "requires", ("weight-nrom",))
    with pytest.raises(InputError, match="there is no analysis 'weight-nrom'; did you mean 'weight-norm'") as caught:
        PassManager([Nothing()])
    assert caught.value.__notes__ == ["required by the pass 'nothing'"]


def test_only_programs_run():
    with pytest.raises(InputError, match=r"needs a Program, not Linear; make one with fxcompress\.trace"):
        PassManager("scale").run(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match=r"task must be a fxcompress\.Task, not list"):
        PassManager("scale").run(toy_program(), [])


def test_the_report_is_built_once_from_before_after_and_records(untouched, monkeypatch):
    import fxcompress.report

    calls = []
    monkeypatch.setattr(fxcompress.report, "build_report", lambda *args: calls.append(args) or "report", raising=False)
    result = PassManager("scale").run(untouched)
    assert (result.report, result.report) == ("report", "report")
    assert calls == [(result.before, result.program, result.records)]


@pytest.mark.parametrize("first_bad", range(1, 8))
def test_bisect_finds_the_first_bad_pass(untouched, first_bad):
    factors = [2.0] * 7
    factors[first_bad - 1] = 1024.0
    limit = weight(untouched).abs().max() * 1000
    checked = []

    def small(program):
        checked.append(program)
        return bool(weight(program).abs().max() < limit)

    found = bisect(untouched, [Scale(factor) for factor in factors], small)
    assert (found.index, found.item) == (first_bad, Scale(1024.0))
    assert weight(found.before).abs().max() < limit <= weight(found.after).abs().max()
    assert len(checked) <= 5
    assert str(found) == f"pass {first_bad}, scale{{factor=1024.0}}, is the first whose result fails the check"


def test_bisect_needs_a_good_input_and_a_bad_result(untouched):
    with pytest.raises(InputError, match="fails the check before any pass"):
        bisect(untouched, "scale", lambda program: False)
    with pytest.raises(InputError, match="the result of 'scale,nothing' passes the check; there is nothing to find"):
        bisect(untouched, "scale,nothing", lambda program: True)
