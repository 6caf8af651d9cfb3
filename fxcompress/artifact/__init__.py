"""Artifacts: a Program in one ``.pt2`` file, with everything that is needed to run it, train it and report on it.

The file is a ``torch.export`` archive of the emitted module, so ``torch.export.load`` takes it too, with a manifest in
its extra files. :func:`load` builds the Program from the manifest and the raw weights alone: no user class is needed
and nothing in the file is executed or unpickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils._pytree import tree_flatten

from fxcompress.artifact.archive import FORMAT, FORMAT_VERSION, MANIFEST, check_suffix, opened
from fxcompress.artifact.graph import decode_graph, encode_graph, encode_symbols
from fxcompress.artifact.modules import decode_modules, encode_modules, encode_state, states
from fxcompress.artifact.structure import decode_interface, encode_interface
from fxcompress.artifact.values import Decoder
from fxcompress.engines.reexport import reexport
from fxcompress.errors import ArtifactError, CaptureError, InputError
from fxcompress.ir.emit import with_signature
from fxcompress.ir.program import Diagnostic, Program
from fxcompress.staging import staged
from fxcompress.tracing.untouched import borrowed
from fxcompress.verification.verifier import verify

_SAVABLE = "save Compressed.program, what fxcompress.trace gives, or each of the islands of a PartialProgram"


def save(
    program: Program,
    path: str | os.PathLike[str],
    *,
    pipeline: str = "",
    report: Mapping[str, Any] | None = None,
) -> None:
    """Writes a Program to a ``.pt2`` file, which appears whole or not at all and is read back before it does.

    Args:
        program: What to save.
        path: Where to; must end in ``.pt2``.
        pipeline: Text of the pipeline that made it, kept for :func:`read_manifest`.
        report: JSON data kept for :func:`read_manifest`.

    Raises:
        ArtifactError: The path cannot be written, ``program`` is no Program, or it holds what cannot be saved as data
            (weights on the meta device, tensor subclasses, modules that are no standard layers).
    """
    given: Any = program
    if not isinstance(given, Program):
        raise ArtifactError(
            f"{path} was not written: only a Program can be saved, not {type(given).__name__}; {_SAVABLE}"
        )
    file = Path(path)
    check_suffix(file)
    try:
        manifest = _manifest(program, pipeline, report)
    except ArtifactError as error:
        raise ArtifactError(f"{program.name} cannot be saved to {file}: {error}") from error
    with staged(file) as staging:
        torch.export.save(_exported(program, file), staging, extra_files={MANIFEST: manifest})
        _check_same(program, load(staging), file)


def load(path: str | os.PathLike[str], *, device: torch.device | str | None = None) -> Program:
    """Reads the Program that :func:`save` wrote. Nothing in the file is executed, and no pickle is read.

    Structured outputs keep their class where it is registered with pytree in this process (that of an installed
    ``transformers`` is); otherwise they become dicts of the fields.

    Args:
        path: A ``.pt2`` file.
        device: Where to put it; ``None`` for the device it was saved from.

    Raises:
        ArtifactError: The file is missing, damaged, not ours, of a newer format, or needs an operator or a device that
            is not here.
        InputError: ``device`` is none, or this machine does not have it.
    """
    target = None if device is None else _device(device)
    with opened(path) as archive:
        manifest = archive.manifest
        decoder = Decoder(target)
        root = decode_modules(manifest["modules"], manifest["state"], archive.read, decoder)
        graph_module = decode_graph(manifest["graph"], manifest["symbols"], root, decoder)
        diagnostics = tuple(Diagnostic(**entry) for entry in manifest["diagnostics"])
        interface = decode_interface(manifest["interface"], decoder)
        program = Program(graph_module, interface, diagnostics, str(manifest["name"]))
        verify(program)
        return program


def _device(given: torch.device | str) -> torch.device:
    try:
        device = torch.device(given)
        torch.empty(0, device=device)
    except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:  # by device and by build of torch
        raise InputError(f"nothing can be loaded to the device {given!r} on this machine; give 'cpu'") from error
    return device


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of an artifact: versions, pipeline text, report and graph, as JSON data.

    Raises:
        ArtifactError: As for :func:`load`.
    """
    with opened(path) as archive:
        return archive.manifest


def _manifest(program: Program, pipeline: str, report: Mapping[str, Any] | None) -> str:
    if any(isinstance(leaf, torch.Tensor) and leaf.is_meta for leaf in program.interface.leaves):
        raise ArtifactError("its example inputs are on the meta device: trace the model with its weights")
    data = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "fxcompress": version("fxcompress"),
        "torch": torch.__version__,
        "name": program.name,
        "pipeline": pipeline,
        "report": report,
        "diagnostics": [vars(diagnostic) for diagnostic in program.diagnostics],
        "interface": encode_interface(program.interface),
        "symbols": encode_symbols(program.graph),
        "graph": encode_graph(program.graph),
        "modules": encode_modules(program.graph_module),
        "state": encode_state(program.graph_module),
    }
    try:
        return json.dumps(data)
    except TypeError as error:
        raise ArtifactError(f"the report is not JSON data: {error}") from error


def _exported(program: Program, file: Path) -> ExportedProgram:
    model = with_signature(program, lambda tensor: tensor)
    try:
        with borrowed(model):
            return reexport(model, program.interface)
    except CaptureError as error:
        raise ArtifactError(f"{program.name} cannot be saved to {file}: {error}") from error


def _check_same(program: Program, again: Program, file: Path) -> None:
    """Compares what was read back, tensor by tensor."""
    before = {state.name: state.tensor for state in states(program.graph_module)}
    after = {state.name: state.tensor for state in states(again.graph_module)}
    examples = zip(program.interface.leaves, again.interface.leaves, strict=True)
    wrong = [name for name in before if name not in after or not _equal(before[name], after[name])]
    wrong += [f"example input {index}" for index, (a, b) in enumerate(examples) if not _equal(a, b)]
    if (
        wrong
        or list(before) != list(after)
        or len(tree_flatten(again.interface.args)[0]) != len(tree_flatten(program.interface.args)[0])
    ):
        raise ArtifactError(
            f"{file} was not written: {', '.join(wrong[:3]) or 'a name'} reads back changed; save to another disk"
        )


def _equal(a: Any, b: Any) -> bool:
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return type(a) is type(b) and bool(a == b)
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a != a)).all())
