import pytest
import torch
from models import residual_net

from fxcompress import Task, compress, registry
from fxcompress.errors import InputError, PipelineError
from fxcompress.pipeline.recipes import RECIPES, choose, recipe
from fxcompress.pipeline.text import parse


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_pipeline_whose_name_is_no_pass(name):
    assert str(recipe(name)) == RECIPES[name]
    assert name not in registry.names()


def test_default_recipe():
    assert RECIPES["default"] == "eliminate-dead,fold-constants,fold-batchnorm"


@pytest.mark.parametrize("name", ["int8", "int8-onnxruntime", "int8-executorch"])
def test_int8_recipes_quantize_and_correct(name, monkeypatch):
    monkeypatch.setattr("fxcompress.passes.insert_qdq.has_vnni", lambda: True)
    torch.manual_seed(0)
    model, x = residual_net().eval(), torch.randn(16, 3, 8, 8)
    out = compress(model, x[:2], name, task=Task(calibration=list(x.split(8))))
    text = out.program.text()
    assert text.count("quantized_decomposed.dequantize_per_channel(") == 7
    marks = [node.meta.get("done", ()) for node in out.program.nodes]
    assert sum("correct-bias" in names for names in marks) == 7
    assert sum("refine-rounding" in names for names in marks) > 0
    with torch.no_grad():
        error = (out.model(x) - model(x)).square().sum() / model(x).square().sum()
    assert float(error) < 10**-3


def test_choose_takes_recipes_text_and_pipelines():
    assert choose("default") == recipe("default")
    assert choose("eliminate-dead") == parse("eliminate-dead")
    assert choose(parse("fold-constants")) == parse("fold-constants")
    assert choose(list(parse("fold-constants"))) == parse("fold-constants")


def test_unknown_recipe_names_the_near_one():
    with pytest.raises(InputError, match="there is no recipe 'defualt'; did you mean 'default'"):
        recipe("defualt")
    with pytest.raises(InputError, match="there is no recipe 'xyz'; recipes: default"):
        recipe("xyz")


def test_a_name_that_is_neither_recipe_nor_pass_names_what_is_near():
    with pytest.raises(InputError, match="'defaullt' is neither a recipe nor a pass; did you mean 'default'"):
        choose("defaullt")
    with pytest.raises(PipelineError, match="unknown pass 'fold-batchnrom'; did you mean 'fold-batchnorm'"):
        choose("fold-batchnrom")


def test_a_pass_whose_name_is_near_a_recipe_is_a_pass(monkeypatch):
    monkeypatch.setattr("fxcompress.pipeline.recipes.RECIPES", {"fold-batchnorms": "fold-constants"})
    assert choose("fold-batchnorm") == parse("fold-batchnorm")
    for text in ("insert-qdq{target=onnxruntime}", "insert-qdq{target=executorch}", "fold-batchnorm,insert-qdq"):
        assert choose(text) == parse(text)
