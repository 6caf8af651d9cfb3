"""Every form of MODEL, and what each wrong one says."""

import sys

import pytest
import torch
from torch import nn
from toys import toy_program

from fxcompress.artifact import save
from fxcompress.cli.models import load_model
from fxcompress.errors import ArtifactError, InputError, MissingExtraError
from fxcompress.ir.program import Program

FACTORIES = """
import torch
from torch import nn

NUMBER = 3

class Small(nn.Linear):
    def __init__(self):
        super().__init__(4, 2)

def with_inputs():
    return nn.Linear(4, 2), torch.ones(3, 4)

def wrong():
    return "a model"

def needs_argument(width):
    return nn.Linear(width, 2)
"""


@pytest.fixture
def models_file(tmp_path):
    path = tmp_path / "my_models.py"
    path.write_text(FACTORIES)
    return path


def test_torchvision_takes_its_own_input_size():
    found = load_model("torchvision:squeezenet1_1")
    assert found.name == "squeezenet1_1"
    assert found.example_inputs.shape == (2, 3, 224, 224)
    assert type(found.model).__name__ == "SqueezeNet"


def test_torchvision_model_without_a_single_input_size_asks_for_input():
    with pytest.raises(InputError, match=r"'torchvision:raft_small' does not say what inputs it takes; .*--input"):
        load_model("torchvision:raft_small")


def test_torchvision_detection_takes_a_list_of_images():
    found = load_model("torchvision:ssdlite320_mobilenet_v3_large")
    (images,) = found.example_inputs
    assert [image.shape for image in images] == [(3, 320, 320)] * 2


def test_weights_of_a_backbone_are_not_downloaded(monkeypatch):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *args, **kwargs: pytest.fail("downloaded"))
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", torch.hub.load_state_dict_from_url)
    assert load_model("torchvision:lraspp_mobilenet_v3_large").example_inputs.shape[:2] == (2, 3)


def test_timm_takes_its_own_input_size():
    found = load_model("timm:test_resnet")
    assert found.example_inputs.shape == (2, 3, *found.model.pretrained_cfg["input_size"][1:])


def test_seed_decides_weights_and_inputs_and_leaves_the_callers_random_state():
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first, again, other = (load_model("timm:test_resnet", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.example_inputs, again.example_inputs)
    assert not torch.equal(first.example_inputs, other.example_inputs)
    weights = [next(found.model.parameters()) for found in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_file_factory_with_its_own_inputs(models_file):
    found = load_model(f"{models_file}:with_inputs")
    assert isinstance(found.model, nn.Linear)
    assert torch.equal(found.example_inputs, torch.ones(3, 4))


def test_a_class_is_a_factory_and_input_text_says_what_it_takes(models_file):
    args, kwargs = load_model(f"{models_file}:Small", inputs=["4"]).example_inputs
    assert args[0].shape == (2, 4)
    assert kwargs == {}


def test_module_factory_is_found_in_the_current_folder(models_file, monkeypatch):
    monkeypatch.chdir(models_file.parent)
    path = list(sys.path)
    assert isinstance(load_model("my_models:with_inputs").model, nn.Linear)
    assert sys.path == path


def test_artifact(tmp_path):
    save(toy_program(), tmp_path / "toy.pt2")
    found = load_model(str(tmp_path / "toy.pt2"))
    assert isinstance(found.model, Program)
    assert (found.example_inputs, found.name) == (None, "toy")
    with pytest.raises(InputError, match="has its own example inputs; leave out --input"):
        load_model(str(tmp_path / "toy.pt2"), inputs=["4"])


def test_missing_artifact():
    with pytest.raises(ArtifactError, match=r"no file nowhere\.pt2"):
        load_model("nowhere.pt2")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("resnet18", "'resnet18' does not name a model; write torchvision:NAME, timm:NAME"),
        ("torchvision:", "does not name a model"),
        ("torchvision:resnet81", "torchvision has no model 'resnet81'; did you mean .*'resnet18'"),
        ("timm:test_resnt", "timm has no model 'test_resnt'; did you mean 'test_resnet'"),
        ("torchvisoin:resnet18", "no source or module 'torchvisoin'; did you mean 'torchvision'"),
        ("no_such_module_here:build", "no source or module 'no_such_module_here'; write torchvision:NAME"),
        ("json:lods", "json has no 'lods'; did you mean 'loads' or 'load'"),
        ("nowhere.py:build", r"no file nowhere\.py"),
    ],
)
def test_unknown(reference, message):
    with pytest.raises(InputError, match=message):
        load_model(reference)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("with_input", "has no 'with_input'; did you mean 'with_inputs'"),
        ("NUMBER", "NUMBER is of type int, not a function"),
        ("wrong", "wrong.. gives an object of type str; return a torch.nn.Module, or a pair"),
        ("needs_argument", "needs_argument.. fails with TypeError: .*called without arguments"),
        ("Small", "does not say what inputs it takes; say what it takes with --input"),
    ],
)
def test_bad_factory(models_file, name, message):
    with pytest.raises(InputError, match=message):
        load_model(f"{models_file}:{name}")


def test_file_that_fails_on_import_says_how(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("import no_such_package_here")
    with pytest.raises(InputError, match=r"broken\.py fails on import with ModuleNotFoundError: No module named"):
        load_model(f"{path}:build")


@pytest.mark.parametrize(("package", "name"), [("torchvision", "resnet18"), ("timm", "resnet18")])
def test_missing_package_says_which_extra(monkeypatch, package, name):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"the model '{package}:resnet18' needs .*fxcompress\[zoo\]"):
        load_model(f"{package}:{name}")
