import copy
import json

import pytest
import torch
from torch import fx, nn

import fxcompress as fxc
from fxcompress.artifact import read_manifest
from fxcompress.pipeline.text import parse
from fxcompress.report import Measure


def small_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    model[1].running_var.uniform_(0.5, 2)
    return model


IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def compressed():
    return fxc.compress(small_model(), IMAGES)


def test_the_compressed_model_is_smaller_and_computes_the_same(compressed):
    assert isinstance(compressed.model, fx.GraphModule)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in compressed.model.modules())
    with torch.no_grad():
        torch.testing.assert_close(compressed.model(IMAGES), small_model().eval()(IMAGES))


def test_it_is_one_module_with_weights_of_its_own(compressed):
    assert compressed.model is compressed.model
    shared = {id(each) for each in compressed.program.graph_module.parameters()}
    assert shared.isdisjoint(id(each) for each in compressed.model.parameters())


def test_the_report_covers_the_traced_program_and_the_compressed_one(compressed):
    assert [row.text for row in compressed.report.passes] == ["eliminate-dead", "fold-constants", "fold-batchnorm"]
    assert compressed.report.before.params - compressed.report.after.params == 8
    assert compressed.before.analyze("cost").layers != compressed.program.analyze("cost").layers


def test_repr_says_what_was_gained(compressed):
    assert repr(compressed).startswith("Compressed(Sequential: params 845 -> 837 (-0.9 %), MACs ")


def test_save_keeps_the_program_the_pipeline_and_the_report(compressed, tmp_path):
    compressed.save(tmp_path / "small.pt2")
    again = fxc.load(tmp_path / "small.pt2")
    with torch.no_grad():
        assert torch.equal(again(IMAGES), compressed.program(IMAGES))
    manifest = read_manifest(tmp_path / "small.pt2")
    assert manifest["pipeline"] == "eliminate-dead,fold-constants,fold-batchnorm"
    assert manifest["report"] == json.loads(compressed.report.to_json())


def test_pipelines_programs_and_text_are_taken():
    program = fxc.trace(small_model(), IMAGES)
    for pipeline in ("fold-batchnorm", parse("fold-batchnorm"), [parse("fold-batchnorm")[0]]):
        assert str(fxc.compress(program, pipeline=pipeline).pipeline) == "fold-batchnorm"


def test_the_callers_model_stays_as_it_was():
    model = small_model().train()
    model.register_forward_hook(lambda *args: None)
    before, hooks = copy.deepcopy(model.state_dict()), dict(model._forward_hooks)
    fxc.compress(model, IMAGES)
    assert model.training
    assert model._forward_hooks == hooks
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_wrong_pipeline_is_found_before_the_model_runs():
    model = small_model()
    model.register_forward_pre_hook(lambda *args: pytest.fail("the model ran"))
    with pytest.raises(fxc.InputError, match="did you mean 'default'"):
        fxc.compress(model, IMAGES, "defualt")


def test_a_task_of_another_type_is_found_before_the_model_runs():
    model = small_model()
    model.register_forward_pre_hook(lambda *args: pytest.fail("the model ran"))
    with pytest.raises(fxc.InputError, match=r"task must be a fxcompress\.Task, not function"):
        fxc.compress(model, IMAGES, task=lambda module: 1.0)


def test_a_program_takes_no_inputs():
    with pytest.raises(fxc.InputError, match="leave out example_inputs"):
        fxc.compress(fxc.trace(small_model(), IMAGES), IMAGES)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("top-1 %", Measure("top-1", 2.0, 1.0, "%")),
        ("top-1 (test) %", Measure("top-1 (test)", 2.0, 1.0, "%")),
        ("mean IoU", Measure("mean IoU", 2.0, 1.0, "")),
        ("%", Measure("%", 2.0, 1.0, "")),
    ],
)
def test_the_tasks_metric_goes_into_the_report_with_its_unit(metric, expected):
    def convolutions_and_norms(module: nn.Module) -> float:
        return sum(isinstance(each, (nn.Conv2d, nn.BatchNorm2d)) for each in module.modules())

    out = fxc.compress(small_model(), IMAGES, task=fxc.Task(evaluate=convolutions_and_norms, metric=metric))
    assert out.report.measures == (expected,)


def test_an_evaluate_that_gives_no_number_is_named():
    with pytest.raises(fxc.InputError, match=r"Task\.evaluate must return a number, not None"):
        fxc.compress(small_model(), IMAGES, task=fxc.Task(evaluate=lambda module: None))
