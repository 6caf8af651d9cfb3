"""Models by reference: a name in torchvision or timm, a factory in a module or file, or a saved ``.pt2`` file."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fxcompress.cli.example_inputs import BATCH, example_inputs
from fxcompress.errors import InputError, MissingExtraError, did_you_mean
from fxcompress.ir.program import Program
from fxcompress.tracing.untouched import seeded

FORMS = "torchvision:NAME, timm:NAME, module.path:factory, file.py:factory or saved.pt2"

_INPUT_REMEDY = "say what it takes with --input, for example --input 3x224x224"


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model and what to call it with.

    Attributes:
        model: The model, or a Program for a ``.pt2`` file.
        example_inputs: As :func:`fxcompress.trace` takes them; ``None`` for a Program, which has its own.
        name: Short name for titles.
    """

    model: nn.Module | Program
    example_inputs: Any
    name: str


def load_model(reference: str, inputs: Sequence[str] = (), seed: int = 0) -> LoadedModel:
    """The model that a reference names.

    Models of torchvision and timm have random weights. A factory is called without arguments and returns a module, or a
    module with its example inputs.

    Args:
        reference: ``torchvision:NAME``, ``timm:NAME``, ``module.path:factory``, ``file.py:factory`` or ``saved.pt2``.
        inputs: Example inputs as text (``3x224x224``); if not given, those that the source of the model declares.
        seed: Seed of random weights and example inputs; the caller's random state stays as it is.

    Raises:
        InputError: If there is no such model, the factory fails, or no example inputs are known.
        MissingExtraError: If torchvision or timm is needed and not installed.
        ArtifactError: If a ``.pt2`` file cannot be loaded.
    """
    if reference.endswith(".pt2"):
        return _load_artifact(reference, inputs)
    source, colon, name = reference.rpartition(":")
    if not colon or not source or not name:
        raise InputError(f"{reference!r} does not name a model; write {FORMS}")
    with seeded(seed):
        model, examples = _made(source, name)
        if inputs:
            examples = example_inputs(inputs)
        if examples is None:
            raise InputError(f"{reference!r} does not say what inputs it takes; {_INPUT_REMEDY}")
    return LoadedModel(model, examples, name)


def _made(source: str, name: str) -> tuple[nn.Module, Any]:
    return _SOURCES[source](name) if source in _SOURCES else _from_factory(source, name)


def _load_artifact(path: str, inputs: Sequence[str]) -> LoadedModel:
    from fxcompress.artifact import load

    if inputs:
        raise InputError(f"{path} has its own example inputs; leave out --input")
    program = load(path)
    return LoadedModel(program, None, Path(path).stem)


def _from_torchvision(name: str) -> tuple[nn.Module, Any]:
    try:
        from torchvision import models
    except ImportError as error:
        raise MissingExtraError("torchvision", "zoo", f"the model 'torchvision:{name}'") from error
    known = models.list_models()
    if name not in known:
        raise InputError(f"torchvision has no model {name!r}{did_you_mean(name, known)}")
    transform = models.get_model_weights(name)["DEFAULT"].transforms()
    examples = _TORCHVISION_INPUTS.get(type(transform).__name__)
    options = inspect.signature(models.get_model_builder(name)).parameters
    # Weights of a backbone would be downloaded otherwise.
    bare = {option: None for option in ("weights", "weights_backbone") if option in options}
    return models.get_model(name, **bare), None if examples is None else examples(transform)


def _square(sizes: Sequence[int]) -> tuple[int, int]:
    return sizes[0], sizes[-1]


_TORCHVISION_INPUTS: Mapping[str, Callable[[Any], Any]] = {
    "ImageClassification": lambda transform: torch.randn(BATCH, 3, *_square(transform.crop_size)),
    "ObjectDetection": lambda transform: ([torch.rand(3, 320, 320) for _ in range(BATCH)],),
    "SemanticSegmentation": lambda transform: torch.randn(BATCH, 3, *_square(transform.resize_size)),
    "VideoClassification": lambda transform: torch.randn(BATCH, 3, 16, *_square(transform.crop_size)),
}
"""Class of the transform that comes with a model's weights -> example inputs."""


def _from_timm(name: str) -> tuple[nn.Module, Any]:
    try:
        import timm
    except ImportError as error:
        raise MissingExtraError("timm", "zoo", f"the model 'timm:{name}'") from error
    known = timm.list_models()
    if name.partition(".")[0] not in known:
        raise InputError(f"timm has no model {name!r}{did_you_mean(name, known)}")
    model: Any = timm.create_model(name, pretrained=False)
    return model, torch.randn(BATCH, *model.pretrained_cfg["input_size"])


_SOURCES: Mapping[str, Callable[[str], tuple[nn.Module, Any]]] = {
    "torchvision": _from_torchvision,
    "timm": _from_timm,
}


def _from_factory(source: str, name: str) -> tuple[nn.Module, Any]:
    with _importable_here():
        module = _import_file(Path(source)) if source.endswith(".py") else _import_module(source)
        if not hasattr(module, name):
            public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            raise InputError(
                f"{source} has no {name!r}{did_you_mean(name, public)}; name a function that makes a model"
            )
        factory = getattr(module, name)
        if not callable(factory):
            raise InputError(
                f"{source}:{name} is of type {type(factory).__name__}, not a function; "
                "name a function that makes a model"
            )
        try:
            made = factory()
        except Exception as error:
            raise InputError(
                f"{source}:{name}() fails with {_said(error)}; the factory is called without arguments"
            ) from error
    model, examples = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise InputError(
            f"{source}:{name}() gives an object of type {type(model).__name__}; "
            "return a torch.nn.Module, or a pair of it and its example inputs"
        )
    return model, examples


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"there is no file {path}; give the path of a Python file, as in models.py:factory")
    name = f"fxcompress_model_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # the name ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"{path} fails on import with {_said(error)}; mend it, or install what it needs") from error
    return module


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise InputError(
                f"the module {name!r} fails on import with {_said(error)}; install what it needs"
            ) from error
        near = did_you_mean(name, _SOURCES)
        raise InputError(f"there is no source or module {error.name!r}{near or f'; write {FORMS}'}") from error
    except Exception as error:
        raise InputError(f"the module {name!r} fails on import with {_said(error)}; mend it") from error


@contextmanager
def _importable_here() -> Iterator[None]:
    """The current folder can be imported from, as with ``python -m``."""
    sys.path.insert(0, "")
    try:
        yield
    finally:
        sys.path.remove("")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
