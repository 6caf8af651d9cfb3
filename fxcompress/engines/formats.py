"""The file formats a model is exported to: how each is written, and how it is run to check it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_flatten

from fxcompress.engines.executorch_format import open_executorch, write_executorch
from fxcompress.engines.names import Names, Pieces, Run
from fxcompress.engines.onnx_dynamic import multiply_integers
from fxcompress.engines.onnx_format import open_onnx, write_onnx
from fxcompress.engines.onnx_integers import add_hard_sigmoids, round_biases
from fxcompress.engines.onnx_pieces import onnx_pieces
from fxcompress.engines.openvino_format import open_openvino, openvino_pieces, write_openvino
from fxcompress.engines.reexport import reexport
from fxcompress.errors import InputError
from fxcompress.ir.program import Interface


@dataclass(frozen=True)
class Format:
    """A file format.

    Attributes:
        purpose: What it is, as the start of a sentence ("Export to ONNX").
        extra: The extra of this package that installs what it needs.
        packages: What it needs, by import name.
        write: Writes a module to a file.
        open: Opens a file for running it on the CPU.
        own_kernels: Whether the engine computes quantized models by integer kernels of its own, which round elsewhere.
        finish: Rewrites a quantized file, once it was found right piece by piece, the way the engine finds its kernels.
        open_pieces: Opens a file cut at the values of those names, to be computed as it is written, where the engine
            would compute something else.
        unsupported: dtypes that cannot go in or out.
    """

    purpose: str
    extra: str
    packages: tuple[str, ...]
    write: Callable[[fx.GraphModule, Interface, Path, Names], None]
    open: Callable[[Path, Names], Run]
    own_kernels: bool = True
    open_pieces: Callable[[Path, Names, Collection[str]], Pieces] | None = None
    finish: Callable[[Path], None] | None = None
    unsupported: frozenset[torch.dtype] = frozenset()


def _write_pt2(module: fx.GraphModule, interface: Interface, path: Path, names: Names) -> None:
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


def _finish_onnxruntime(path: Path) -> None:
    round_biases(path)
    multiply_integers(path)
    add_hard_sigmoids(path)


_NOT_IN_NUMPY = frozenset({torch.bfloat16})

FORMATS: Mapping[str, Format] = {
    ".onnx": Format(
        "Export to ONNX",
        "onnx",
        ("onnx", "onnxscript", "onnxruntime"),
        write_onnx,
        open_onnx,
        open_pieces=onnx_pieces,
        finish=_finish_onnxruntime,
        unsupported=_NOT_IN_NUMPY,
    ),
    ".xml": Format(
        "Export to OpenVINO IR",
        "openvino",
        ("openvino", "onnx", "onnxscript"),
        write_openvino,
        open_openvino,
        open_pieces=openvino_pieces,
        unsupported=_NOT_IN_NUMPY,
    ),
    ".pte": Format("Export to ExecuTorch", "executorch", ("executorch",), write_executorch, open_executorch),
    ".pt2": Format("Export to a torch.export archive", "", (), _write_pt2, _open_pt2, own_kernels=False),
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
