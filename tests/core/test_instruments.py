"""Instruments: verification catches planted bugs; timing, printing and dumps show what ran."""

import logging
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from toys import (
    TOYS,
    BreakGraph,
    CountNodes,
    NotExact,
    Nothing,
    PreserveWrongly,
    Scale,
    WeightNorm,
    WriteThroughData,
    toy_program,
)

from fxcompress import registry
from fxcompress.errors import ArtifactError, InputError, VerificationError
from fxcompress.manager.instruments import (
    AnalysisCheck,
    Dump,
    Instrument,
    Oracle,
    PrintAfter,
    Timing,
    Verify,
    default_instruments,
)
from fxcompress.manager.pass_manager import PassManager
from fxcompress.manager.same import same
from fxcompress.task import Task


@pytest.fixture(autouse=True)
def known_passes(monkeypatch):
    monkeypatch.setattr(registry, "BUILT_IN", {})
    monkeypatch.setattr(registry, "_registered", {cls.name: cls for cls in TOYS})


@pytest.fixture
def program():
    return toy_program()


def test_hooks_are_called_around_the_pipeline_and_each_pass(program):
    calls: list[Any] = []

    class Spy(Instrument):
        def before_pipeline(self, program, pipeline, task):
            calls.append(("before", str(pipeline), task))

        def before_pass(self, program, item):
            calls.append(("before", item.name, program.analyze("count-nodes")))

        def after_pass(self, before, after, record):
            calls.append(("after", record.text, before is after))
            return record

        def after_pipeline(self, program, records):
            calls.append(("after", len(records)))

    task = Task()
    PassManager([CountNodes(), Scale()], [Spy()]).run(program, task)
    assert calls == [
        ("before", "count-nodes,scale", task),
        ("before", "count-nodes", 5), ("after", "count-nodes", True),
        ("before", "scale", 5), ("after", "scale", False),
        ("after", 2),
    ]  # fmt: skip


def test_verification_is_the_default():
    assert [type(instrument) for instrument in default_instruments()] == [Verify, Oracle]
    assert [type(instrument) for instrument in PassManager("scale").instruments] == [Verify, Oracle]
    assert PassManager("scale", []).instruments == ()


def test_verify_records_the_error_of_a_lossy_pass(program):
    lossy, still = PassManager([Scale(1.5), Nothing()]).run(program).records
    assert lossy.comparison is not None
    assert 0 < lossy.comparison.max_abs_error < math.inf
    assert not lossy.comparison.exact
    assert still.comparison is None


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (NotExact(), "the rewrite must be exact, but the output differs"),
        (BreakGraph(), "is not in normal form"),
        (
            WriteThroughData(),
            "'write-through-data' wrote into the tensor '0.weight', which the caller's model may share",
        ),
    ],
)
def test_verify_catches_a_broken_pass(program, item, message):
    with pytest.raises(VerificationError, match=message) as caught:
        PassManager([Nothing(), item]).run(program)
    assert caught.value.__notes__ == [f"in pass 2 of 2: {item}"]


def test_verify_leaves_out_numbers_on_the_meta_device():
    from fxcompress.tracing import trace

    with torch.device("meta"):
        program = trace(torch.nn.Sequential(torch.nn.Linear(4, 4)), torch.randn(2, 4))
    result = PassManager([Scale()]).run(program)
    assert result.records[0].changed
    assert result.records[0].comparison is None


def test_analysis_check_catches_wrong_preservation(program):
    PassManager([PreserveWrongly()]).run(program)  # verification alone does not see it
    with pytest.raises(VerificationError) as caught:
        PassManager([PreserveWrongly()], [AnalysisCheck()]).run(program)
    assert "'preserve-wrongly' says that it preserves the analysis 'weight-norm', but its value changed" in str(
        caught.value
    )


def test_analysis_check_accepts_what_is_preserved_and_skips_what_it_is_told(program):
    kept = PassManager([CountNodes(), Scale()], [AnalysisCheck()]).run(program)
    assert [analysis.name for analysis in kept.program._analyses] == ["count-nodes"]
    skipped = PassManager([PreserveWrongly()], [AnalysisCheck(skip=["weight-norm"])]).run(program)
    assert [analysis.name for analysis in skipped.program._analyses] == ["weight-norm"]


def test_timing_has_a_row_for_each_pass(program, caplog):
    timing = Timing()
    with caplog.at_level(logging.INFO, "fxcompress.manager.instruments"):
        result = PassManager("scale,scale,count-nodes", [timing]).run(program)
    assert list(timing.seconds) == ["01 scale", "02 scale", "03 count-nodes"]
    assert list(timing.seconds.values()) == [record.seconds for record in result.records]
    assert timing.total >= sum(timing.seconds.values()) > 0
    assert [line.split(" s  ")[1] for line in caplog.messages] == [*timing.seconds, "copies and checks"]


def test_print_after_logs_the_text_after_the_named_passes(program, caplog):
    with caplog.at_level(logging.INFO, "fxcompress.manager.instruments"):
        result = PassManager("scale,nothing", [PrintAfter("scale")]).run(program)
    assert caplog.messages == [f"after scale:\n{result.program.text()}"]
    caplog.clear()
    with caplog.at_level(logging.INFO, "fxcompress.manager.instruments"):
        PassManager("scale,nothing", [PrintAfter()]).run(program)
    assert [message.partition(":")[0] for message in caplog.messages] == ["after scale", "after nothing"]


def test_print_after_a_pass_that_is_not_there(program):
    with pytest.raises(InputError, match="the pipeline has no pass 'scal' to print after; did you mean 'scale'"):
        PassManager("scale,nothing", [PrintAfter("scal")]).run(program)


def test_dumps_are_numbered_and_replace_those_of_an_earlier_run(program, tmp_path):
    folder = tmp_path / "new" / "dumps"
    PassManager("scale,scale,swap-activation", [Dump(folder)]).run(program)
    (folder / "09-notes.txt").write_text("mine\n")
    result = PassManager("count-nodes,swap-activation", [Dump(folder)]).run(program)
    assert sorted(path.name for path in folder.iterdir()) == ["00-input.txt", "02-swap-activation.txt", "09-notes.txt"]
    assert (folder / "00-input.txt").read_text() == (
        f"# fxcompress dump: count-nodes,swap-activation\n{program.text()}"
    )
    assert (folder / "02-swap-activation.txt").read_text() == (
        f"# fxcompress dump: swap-activation\n{result.program.text()}"
    )


def test_a_dump_before_verification_shows_the_program_that_fails(program, tmp_path):
    with pytest.raises(VerificationError):
        PassManager([NotExact()], [Dump(tmp_path), *default_instruments()]).run(program)
    assert (tmp_path / "01-not-exact.txt").exists()


def test_a_folder_that_cannot_be_written(program, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"cannot dump into .*file: .*; give a folder that can be written"):
        PassManager("scale", [Dump(tmp_path / "file")]).run(program)


@dataclass(frozen=True)
class Value:
    number: float
    array: Any = field(default_factory=lambda: np.arange(3))


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (Value(1.0), Value(1.0), True),
        (Value(1.0), Value(1.5), False),
        (Value(math.nan), Value(math.nan), True),
        (Value(1.0), Value(1.0, np.arange(4)), False),
        ({"a": [torch.ones(2)]}, {"a": [torch.ones(2)]}, True),
        ({"a": [torch.ones(2)]}, {"a": [torch.zeros(2)]}, False),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, False),
        ((1, 2), (1, 2, 3), False),
        (1, 1.0, False),
        ("a", "a", True),
        (torch.ones(2), torch.ones(2, dtype=torch.float64), False),
        (torch.full((2,), math.nan), torch.full((2,), math.nan), True),
    ],
)
def test_same_compares_contents(a, b, expected):
    assert same(a, b) is expected


def test_weight_norms_are_compared_by_value(program):
    assert same(WeightNorm().run(program, None), WeightNorm().run(program, None))
