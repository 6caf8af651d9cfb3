"""Analyses are computed once, after what they require, read only, and dropped when they may be stale."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from toys import TOYS, CountNodes, Scale, WeightNorm, WritingAnalysis, put_weight, toy_program

from fxcompress import registry
from fxcompress.analysis import analyze, invalidate
from fxcompress.errors import InputError, VerificationError
from fxcompress.manager.fingerprint import checksums, difference, fingerprint
from fxcompress.pass_base import Analysis
from fxcompress.task import Task


@pytest.fixture(autouse=True)
def known_passes(monkeypatch):
    monkeypatch.setattr(registry, "BUILT_IN", {})
    monkeypatch.setattr(registry, "_registered", {cls.name: cls for cls in TOYS})


@pytest.fixture
def runs(monkeypatch):
    """Names of the analyses in the order they ran."""
    runs: list[str] = []
    monkeypatch.setattr(CountNodes, "runs", runs)
    monkeypatch.setattr(WeightNorm, "runs", runs)
    return runs


def test_an_analysis_runs_once_after_what_it_requires(runs):
    program = toy_program()
    first = analyze(program, "weight-norm")
    assert analyze(program, WeightNorm()) is first
    assert program.analyze("weight-norm") is first
    assert analyze(program, "count-nodes") == 5
    assert runs == ["count-nodes", "weight-norm"]


def test_options_make_another_value(runs):
    program = toy_program()
    two, one = analyze(program, "weight-norm"), analyze(program, "weight-norm{order=1}")
    assert (one[0] > two[0]).item()
    assert runs == ["count-nodes", "weight-norm", "weight-norm"]


def test_a_copy_keeps_the_values_but_not_the_cache(runs):
    program = toy_program()
    analyze(program, "count-nodes")
    copy = program.copy()
    invalidate(copy, ())
    assert analyze(program, "count-nodes") == 5
    assert runs == ["count-nodes"]


def test_invalidate_keeps_what_is_preserved(runs):
    program = toy_program()
    analyze(program, "weight-norm")
    analyze(program, "weight-norm{order=1}")
    invalidate(program, ("weight-norm",))
    assert {item.name for item in program._analyses} == {"weight-norm"}
    assert len(program._analyses) == 2


def test_another_task_is_another_value(runs):
    program, task = toy_program(), Task(calibration=[1])
    analyze(program, "count-nodes", task)
    analyze(program, "count-nodes", task)
    analyze(program, "count-nodes")
    assert runs == ["count-nodes"]
    analyze(program, "count-nodes", Task(calibration=[1]))
    assert runs == ["count-nodes", "count-nodes"]


def test_an_analysis_that_writes_is_caught_and_not_kept():
    program = toy_program()
    with pytest.raises(
        VerificationError, match=r"'writing-analysis' changed the Program \(tensor '0.weight' is different\)"
    ):
        analyze(program, WritingAnalysis())
    assert program._analyses == {}


def test_only_programs_are_analysed():
    with pytest.raises(InputError, match=r"analyze needs a Program, not Linear; make one with fxcompress\.trace"):
        analyze(torch.nn.Linear(2, 2), "count-nodes")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("weight-nrom", "there is no analysis 'weight-nrom'; did you mean 'weight-norm'?"),
        ("scale", "'scale' is a transform, not an analysis; analyses: count-nodes, weight-norm, writing-analysis"),
        (Scale(), "'scale' is a transform, not an analysis"),
        ("depth", "there is no analysis 'depth'; analyses: count-nodes, weight-norm, writing-analysis"),
        ("count-nodes,weight-norm", "'count-nodes,weight-norm' names 2 passes; give one analysis"),
        (CountNodes, r"<class 'toys.CountNodes'> is not an analysis; give CountNodes\(\)"),
        (3, "3 is not an analysis; give its name or an Analysis"),
    ],
)
def test_what_is_not_an_analysis_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        analyze(toy_program(), given)


def test_analyses_that_require_each_other_are_refused(monkeypatch):
    @dataclass(frozen=True)
    class Hen(Analysis[int]):
        name: ClassVar[str] = "hen"
        requires: ClassVar[tuple[str, ...]] = ("egg",)

        def run(self, program, task):
            return 0

    @dataclass(frozen=True)
    class Egg(Hen):
        name: ClassVar[str] = "egg"
        requires: ClassVar[tuple[str, ...]] = ("hen",)

    registry.register(Hen)
    registry.register(Egg)
    with pytest.raises(InputError, match="analyses require each other: hen -> egg -> hen; break the circle"):
        analyze(toy_program(), "hen")


def rename_node(program):
    next(iter(program.nodes)).name = "renamed"


def change_argument(program):
    relu = next(node for node in program.nodes if "relu" in node.name)
    relu.args = (next(iter(program.nodes)),)


def change_attribute(program):
    program.graph_module.get_submodule("0").in_features = 7


def change_mode(program):
    program.graph_module.get_submodule("0").train()


def freeze_weight(program):
    program.graph_module.get_submodule("0").weight.requires_grad_(False)


def drop_module(program):
    program.graph_module.delete_submodule("2")


def annotate(program):
    next(iter(program.nodes)).meta["note"] = "new"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (rename_node, "node 'input_1' is gone"),
        (change_argument, "node 'relu' is different"),
        (change_attribute, "module '0' is different"),
        (change_mode, "module '0' is different"),
        (freeze_weight, "tensor '0.weight' is different"),
        (drop_module, "module '2' is gone"),
        (annotate, "node 'input_1' is different"),
        (lambda program: put_weight(program, 1.0), "tensor '0.weight' is different"),
        (lambda program: program.graph_module.get_submodule("0").weight.data.mul_(2), None),
    ],
)
def test_a_fingerprint_shows_each_kind_of_change(change, what):
    program = toy_program()
    before = fingerprint(program)
    change(program)
    assert difference(before, fingerprint(program)) == what


def test_a_copy_has_the_same_fingerprint():
    program = toy_program()
    assert difference(fingerprint(program.copy()), fingerprint(program)) is None


def test_checksums_see_a_write_that_the_version_counter_misses():
    program = toy_program()
    before = checksums(program)
    program.graph_module.get_submodule("0").weight.data[0, 0] += 1
    after = checksums(program)
    assert [name for name in before if before[name] != after[name]] == ["0.weight"]
