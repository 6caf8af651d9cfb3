"""The file formats a model is exported to: how each is written, and how it is run to check it."""

from __future__ import annotations

import functools
import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from fxcompress.engines.reexport import reexport
from fxcompress.errors import ArtifactError, InputError
from fxcompress.ir.program import Interface

logger = logging.getLogger(__name__)

Run = Callable[[Sequence[torch.Tensor]], list[Any]]
"""Runs a file on the tensors of a call; gives the tensors of the output."""


@dataclass(frozen=True)
class Names:
    """Readable names of the tensors that go in and come out, in order, and of each input's dynamic dims."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dims: tuple[dict[int, str], ...]


@dataclass(frozen=True)
class Format:
    """A file format.

    Attributes:
        purpose: What it is, as the start of a sentence ("Export to ONNX").
        extra: The extra of this package that installs what it needs.
        packages: What it needs, by import name.
        write: Writes a module to a file.
        open: Opens a file for running it on the CPU.
        unsupported: dtypes that cannot go in or out.
    """

    purpose: str
    extra: str
    packages: tuple[str, ...]
    write: Callable[[nn.Module, Interface, Path, Names], None]
    open: Callable[[Path, Names], Run]
    unsupported: frozenset[torch.dtype] = frozenset()


def _write_pt2(module: nn.Module, interface: Interface, path: Path, names: Names) -> None:
    torch.export.save(reexport(module, interface), path)


def _open_pt2(path: Path, names: Names) -> Run:
    exported = torch.export.load(path)  # written by us a moment ago
    module = exported.module()
    assert exported.example_inputs is not None
    examples, spec = tree_flatten(exported.example_inputs)

    def run(tensors: Sequence[torch.Tensor]) -> list[Any]:
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in examples]
        args, kwargs = spec.unflatten(leaves)
        with torch.no_grad():
            return [leaf for leaf in tree_flatten(module(*args, **kwargs))[0] if isinstance(leaf, torch.Tensor)]

    return run


class _TensorOutputs(nn.Module):
    """A model's outputs as a flat tuple, without what is no tensor: ONNX has no place for it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

        @functools.wraps(model.forward)  # torch.export reads the signature, and names what it guards after it
        def forward(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
            return tuple(leaf for leaf in tree_flatten(model(*args, **kwargs))[0] if isinstance(leaf, torch.Tensor))

        self.forward = forward


def _write_onnx(module: nn.Module, interface: Interface, path: Path, names: Names) -> None:
    import onnx

    exported = reexport(_TensorOutputs(module).eval(), interface)
    with _quiet():
        try:
            program = torch.onnx.export(
                exported,
                dynamo=True,
                external_data=False,
                verbose=False,
                input_names=names.inputs,
                output_names=names.outputs,
            )
        except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
            raise ArtifactError(_explain(error)) from error
    assert program is not None
    model = program.model_proto
    _name_dims(model, names)
    onnx.save(model, path)


def _explain(error: BaseException) -> str:
    causes: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        causes.append(str(cause).strip() or type(cause).__name__)
        cause = cause.__cause__
    found = re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)', overload='(\w+)'\)", "\n".join(causes))
    if found is None:
        return f"ONNX export fails: {causes[-1].splitlines()[0]}; export to .pt2 instead"
    return (
        f"ONNX export has no translation for the operator {found[1]}.{found[2]}; write it with other operations, or "
        "export to .pt2 instead"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter's progress lines and notices to itself; errors still come as exceptions."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    before = [talker.level for talker in loggers]
    said = StringIO()
    try:
        for talker in loggers:
            talker.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), redirect_stdout(said):
            warnings.simplefilter("ignore")
            yield
    finally:
        for talker, level in zip(loggers, before, strict=True):
            talker.setLevel(level)
        if said.getvalue():
            logger.debug("the ONNX exporter said: %s", said.getvalue())


def _name_dims(model: Any, names: Names) -> None:
    """Names dynamic dims after what they are, also where the file has several symbols for sizes that are the same."""
    symbols: dict[str, str] = {}
    dims = dict(zip(names.inputs, names.dims, strict=True))
    for value in model.graph.input:
        for index, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_param:
                symbols.setdefault(dim.dim_param, dims[value.name].get(index, f"{value.name}_dim{index}"))
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:  # may be an expression of several
                dim.dim_param = re.sub(r"[A-Za-z_]\w*", lambda word: symbols.get(word[0], word[0]), dim.dim_param)


def _open_onnx(path: Path, names: Names) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise ArtifactError(
            f"onnxruntime cannot run {path.name}: {error}; use a dtype or operator that it knows, or export to .pt2"
        ) from error
    kept = {value.name for value in session.get_inputs()}

    def run(tensors: Sequence[torch.Tensor]) -> list[Any]:
        feed = {
            name: tensor.numpy(force=True) for name, tensor in zip(names.inputs, tensors, strict=True) if name in kept
        }
        return [torch.from_numpy(array) for array in session.run(list(names.outputs), feed)]

    return run


def _write_openvino(module: nn.Module, interface: Interface, path: Path, names: Names) -> None:
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        onnx_file = Path(folder) / "model.onnx"
        _write_onnx(module, interface, onnx_file, names)
        model = openvino.convert_model(onnx_file)
        openvino.save_model(model, path, compress_to_fp16=False)


def _open_openvino(path: Path, names: Names) -> Run:
    import openvino

    core = openvino.Core()
    compiled = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    kept = {name for port in compiled.inputs for name in port.names}

    def run(tensors: Sequence[torch.Tensor]) -> list[Any]:
        feed = {
            name: tensor.numpy(force=True) for name, tensor in zip(names.inputs, tensors, strict=True) if name in kept
        }
        results = compiled(feed)
        return [torch.from_numpy(results[name].copy()) for name in names.outputs]

    return run


_NOT_IN_NUMPY = frozenset({torch.bfloat16})

FORMATS: Mapping[str, Format] = {
    ".onnx": Format(
        "Export to ONNX", "onnx", ("onnx", "onnxscript", "onnxruntime"), _write_onnx, _open_onnx, _NOT_IN_NUMPY
    ),
    ".xml": Format(
        "Export to OpenVINO IR",
        "openvino",
        ("openvino", "onnx", "onnxscript"),
        _write_openvino,
        _open_openvino,
        _NOT_IN_NUMPY,
    ),
    ".pt2": Format("Export to a torch.export archive", "", (), _write_pt2, _open_pt2),
}
"""Suffix -> format."""


def format_of(path: Path) -> Format:
    """The format that a file name's suffix stands for.

    Raises:
        InputError: None does.
    """
    if path.suffix not in FORMATS:
        known = ", ".join(f"{suffix} ({entry.purpose.removeprefix('Export to ')})" for suffix, entry in FORMATS.items())
        raise InputError(f"{path} ends in {path.suffix or 'no suffix'!r}; a model can be exported to {known}")
    return FORMATS[path.suffix]
