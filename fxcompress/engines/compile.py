"""``compile``: a model as a callable that runs on an engine, called the way the model is called."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fxcompress.engines import inductor
from fxcompress.engines.export import export, tensor_names
from fxcompress.engines.formats import FORMATS
from fxcompress.engines.latency import measure
from fxcompress.engines.names import Run
from fxcompress.errors import FxCompressError, InputError, did_you_mean
from fxcompress.ir.emit import INTERFACE
from fxcompress.ir.program import Interface, Program
from fxcompress.tracing import trace
from fxcompress.tracing.inputs import flatten_call

logger = logging.getLogger(__name__)

AUTO = "auto"
_MEASURED = ("eager", "onnxruntime", "openvino")
_ROUNDS, _BUDGET_S = 15, 3.0


@dataclass(frozen=True, eq=False)
class CompiledModel:
    """A model on an engine; call it as you call the model. It computes no gradients.

    Attributes:
        engine: Name of the engine.
        interface: How it is called, with the example inputs.
        size: Bytes of the file that the engine reads; of the weights, where it reads none.
        call: What is called.
        measured: With ``engine="auto"``: engine -> its latency, or why it does not run.
    """

    engine: str
    interface: Interface = field(repr=False)
    size: int
    call: Callable[..., Any] = field(repr=False)
    measured: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self.call(*args, **kwargs)


def compile(
    model: nn.Module | Program | CompiledModel, engine: str = "openvino", example_inputs: Any = None
) -> CompiledModel:
    """Prepares a model for an engine; dims that were dynamic when it was traced stay so.

    Args:
        model: A Program, a module that a Program emitted, or any other module with its example inputs. The result keeps
            its weights of now (``eager`` and ``inductor`` share them, unless the latter runs a quantized model).
        engine: ``eager``, ``inductor``, ``onnxruntime``, ``openvino`` or ``executorch``; the last three run on the CPU.
            ``inductor`` runs what ``insert-qdq{target=x86}`` made in integers, for which it needs torchao.
            ``auto`` measures all but ``inductor``, which may compile for minutes, and ``executorch``, whose dynamic
            dims have bounds (see :func:`fxcompress.export`), on the example inputs and takes the fastest of those that
            compute what the model computes.
        example_inputs: As for :func:`fxcompress.trace`, where the model does not carry its own.

    Raises:
        InputError: If there is no such engine, or no example inputs.
        MissingExtraError: If a package that the engine needs is not installed.
        CaptureError: If the model cannot be captured as a whole.
        ArtifactError: If the engine cannot take the model.
        VerificationError: If the engine computes something else.
    """
    if engine != AUTO:
        check_engine(engine)
    module = _emitted(model, example_inputs)
    return _fastest(module) if engine == AUTO else _compiled(module, engine)


def _compiled(module: fx.GraphModule, engine: str) -> CompiledModel:
    interface: Interface = module.meta[INTERFACE]
    call, size = ENGINES[engine](module, interface)
    return CompiledModel(engine, interface, size, call)


def _fastest(module: fx.GraphModule) -> CompiledModel:
    """The fastest of the engines that run a module; what was measured is kept and logged."""
    candidates: dict[str, CompiledModel] = {}
    measured: dict[str, str] = {}
    for engine in _MEASURED:
        logger.info("preparing %s", engine)
        try:
            candidates[engine] = _compiled(module, engine)
        except FxCompressError as error:
            measured[engine] = str(error)
    interface: Interface = module.meta[INTERFACE]
    calls = {engine: partial(found, *interface.args, **interface.kwargs) for engine, found in candidates.items()}
    latency = measure(calls, rounds=_ROUNDS, budget=_BUDGET_S)
    measured = {**{engine: str(found) for engine, found in latency.items()}, **measured}
    for engine, found in measured.items():
        logger.info("%s: %s", engine, found)
    fastest = min(latency, key=lambda engine: latency[engine].median)
    return replace(candidates[fastest], measured=measured)


def check_engine(name: str) -> None:
    """Raises :class:`InputError` with near names if there is no such engine."""
    if name not in ENGINES:
        near = did_you_mean(name, [*ENGINES, AUTO]) or f"; engines: {', '.join([*ENGINES, AUTO])}"
        raise InputError(f"there is no engine {name!r}{near}")


def _emitted(model: Any, example_inputs: Any) -> fx.GraphModule:
    """A module that carries its interface."""
    if isinstance(model, Program):
        return model.emit()
    if isinstance(model, fx.GraphModule) and INTERFACE in model.meta and example_inputs is None:
        return model
    if example_inputs is None:
        raise InputError(f"this {type(model).__name__} carries no example inputs; pass example_inputs")
    return trace(model, example_inputs).emit()


Built = tuple[Callable[..., Any], int]


def _eager(module: fx.GraphModule, interface: Interface) -> Built:
    return partial(_checked, module.eval(), interface), _weight_bytes(module)


def _inductor(module: fx.GraphModule, interface: Interface) -> Built:
    return partial(_checked, inductor.compiled(module.eval(), interface), interface), _weight_bytes(module)


def _checked(call: Callable[..., Any], interface: Interface, *args: Any, **kwargs: Any) -> Any:
    """A call whose inputs are checked first, as engines that read a file need them to be."""
    flatten_call(interface, args, kwargs)
    return call(*args, **kwargs)


def _weight_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


@dataclass(frozen=True, eq=False)
class _File:
    """Runs an exported file; the folder stays as long as this, since engines may map files into memory."""

    folder: tempfile.TemporaryDirectory[str]
    run: Run
    interface: Interface
    output: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves = flatten_call(self.interface, args, kwargs)
        found = iter(self.run([leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]))
        example, spec = tree_flatten(self.output)
        return tree_unflatten([next(found) if isinstance(leaf, torch.Tensor) else leaf for leaf in example], spec)


def _from_file(suffix: str) -> Callable[[fx.GraphModule, Interface], Built]:
    def build(module: fx.GraphModule, interface: Interface) -> Built:
        folder = tempfile.TemporaryDirectory(prefix="fxcompress-")
        file = Path(folder.name) / f"model{suffix}"
        size = export(module, file).size
        with torch.no_grad():
            output = module(*interface.args, **interface.kwargs)
        run = FORMATS[suffix].open(file, tensor_names(interface, output))
        return _File(folder, run, interface, output), size

    return build


ENGINES: Mapping[str, Callable[[fx.GraphModule, Interface], Built]] = {
    "eager": _eager,
    "inductor": _inductor,
    "onnxruntime": _from_file(".onnx"),
    "openvino": _from_file(".xml"),
    "executorch": _from_file(".pte"),
}
"""Engine -> what builds a callable for a module in eval mode, and gives its size in bytes."""
