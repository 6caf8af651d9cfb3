"""``export``: a model as the file of an engine, checked by running the file."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves

from fxcompress.engines.formats import Format, format_of
from fxcompress.engines.installed import require
from fxcompress.engines.integers import is_quantized, with_integer_weights, without_quantization
from fxcompress.engines.names import Names, Pieces
from fxcompress.engines.pieces import PieceCheck, cut_names
from fxcompress.errors import (
    ArtifactError,
    CaptureError,
    FxCompressError,
    InputError,
    VerificationError,
)
from fxcompress.ir.emit import INTERFACE, with_signature
from fxcompress.ir.program import Interface, Program
from fxcompress.staging import staged
from fxcompress.tracing.inputs import prepare
from fxcompress.tracing.untouched import borrowed, seeded
from fxcompress.verification.numerics import Comparison, compare_outputs, measure_outputs

TOLERANCES = {
    torch.float64: 1e-5,  # engines may compute in float32
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 5e-2,
}
"""Largest error that an engine may add, relative to the largest reference value, by the output's dtype."""

ENGINE_MARGIN_DB = 6.0
"""How much further than quantization itself an engine's integer kernels may take a quantized model from the model in
floating point. Two roundings of one model that have nothing in common differ by twice the noise of one (3 dB); 3 dB are
for samples. It holds only for what the engine makes of a file that was found right piece by piece."""

ENGINE_SQNR_DB = 40.0
"""What is always near enough in an engine (1 % of the signal): the noise of quantization may be less by accident."""


_SATURATED = (
    "The file is right, but the engine's integer kernels are not: where the processor has no VNNI, sums of full-range "
    "8-bit weights saturate, which insert-qdq{weight-bits=7} avoids; where that is not it, the engine is at fault: "
    "keep layers in floating point (skip), or quantize for another target"
)
_UNKNOWN = "Quantize for another target, or export to another format"


@dataclass(frozen=True)
class Exported:
    """A file that was written and checked.

    Attributes:
        path: The file.
        size: Bytes of the file (with the weights beside it, for OpenVINO).
        max_relative_error: Largest difference from the model, relative to the largest value of an output.
    """

    path: Path
    size: int
    max_relative_error: float

    def __str__(self) -> str:
        return f"{self.path} ({self.size / 2**20:.2f} MiB, max relative error {self.max_relative_error:.1e})"


def export(model: nn.Module | Program, path: str | os.PathLike[str], example_inputs: Any = None) -> Exported:
    """Writes a model as ONNX (``.onnx``), OpenVINO IR (``.xml`` and ``.bin``), ExecuTorch program (``.pte``) or a
    ``torch.export`` archive (``.pt2``).

    The file keeps the dynamic dims the model was traced with; in ExecuTorch, which plans its memory ahead, they can
    grow to four times the example's, and at least to 8. It is run on the example inputs at two batch sizes and compared
    with the model before it takes its place; if it is off, nothing is written.

    Args:
        model: A Program, or a module that a Program emitted. It is not changed; it is exported in eval mode.
        path: Where to; the suffix selects the format.
        example_inputs: As for :func:`fxcompress.trace`, where the model does not carry its own (after unpickling).

    Returns:
        What was written.

    Raises:
        InputError: Unknown suffix, no example inputs, weights on the meta device, or a dtype that the engine cannot
            take.
        MissingExtraError: A package that the format needs is not installed.
        ArtifactError: The path cannot be written, or an operator has no counterpart in the format.
        VerificationError: The file computes something else; the message names the output and the error.
    """
    file = Path(path)
    target = format_of(file)
    for package in target.packages:
        require(package, target.extra, target.purpose)
    module, interface = _resolve(model, example_inputs)
    with borrowed(module):
        try:
            return _write(module, interface, file, target)
        except (CaptureError, ArtifactError) as error:
            if str(file) in str(error):
                raise
            raise ArtifactError(f"{file} cannot be written: {error}") from error


def _resolve(model: nn.Module | Program, example_inputs: Any) -> tuple[fx.GraphModule, Interface]:
    interface: Interface | None
    if isinstance(model, Program):
        module, interface = with_signature(model, lambda tensor: tensor), model.interface
    elif isinstance(model, fx.GraphModule):
        module, interface = model, model.meta.get(INTERFACE)
    else:
        raise InputError(
            f"export takes a Program or an emitted GraphModule, not {type(model).__name__}; trace it first with "
            "fxcompress.trace, or export each of the islands of a PartialProgram"
        )
    if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        raise InputError("the model is on the meta device and has no weights to export; load them first")
    if example_inputs is not None:
        inputs = prepare(module, example_inputs)
        interface = inputs.interface(inputs.spec)
    if interface is None:
        raise InputError(
            "this GraphModule carries no example inputs (unpickled, or not emitted here); pass example_inputs"
        )
    return module, interface


def _write(module: fx.GraphModule, interface: Interface, file: Path, target: Format) -> Exported:
    calls = _calls(interface)
    outputs = _outputs(module, calls)
    expected = [_tensors(output) for output in outputs]
    names = tensor_names(interface, outputs[0])
    _check_dtypes([*_tensors(calls[0]), *expected[0]], target)
    with staged(file) as staging:
        written = with_integer_weights(module)
        if written is not module and target.open_pieces is None:  # else the pieces tell
            for reference, output in zip(expected, _outputs(written, calls), strict=True):
                _check(file, names, reference, _tensors(output))
        target.write(written, interface, staging, names)
        exact: list[Any] = [None for _ in expected]
        if is_quantized(module) and target.own_kernels:
            if target.open_pieces is not None:
                _check_pieces(file, partial(target.open_pieces, staging), module, interface, names, calls, outputs)
            exact = [_tensors(output) for output in _outputs(without_quantization(module), calls)]
            if target.finish is not None:
                target.finish(staging)
        with _engine(file):
            run = target.open(staging, names)
        errors, rounding = [], _rounding(module)
        for call, reference, before in zip(calls, expected, exact, strict=True):
            with seeded(), _engine(file):
                given = run(_tensors(call))
            errors.append(_check(file, names, reference, given, before, rounding))
        size = sum(made.stat().st_size for made in staging.parent.iterdir())
    return Exported(file, size, max(errors))


@contextmanager
def _engine(file: Path) -> Iterator[None]:
    """Says of an engine's own errors, which share no base class, which file they are about."""
    try:
        yield
    except FxCompressError:
        raise
    except Exception as error:  # those of onnxruntime and OpenVINO share no base class
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[-1] if lines else type(error).__name__
        raise ArtifactError(
            f"{file} was not written: the engine cannot run it ({reason}); export to another format, and report it"
        ) from error


def _rounding(module: fx.GraphModule) -> float:
    """What an engine may add where a model computes in 16 bits, by rounding to those elsewhere than the model does."""
    arguments = (leaf for node in module.graph.nodes for leaf in tree_leaves((node.args, node.kwargs)))
    dtypes = {tensor.dtype for tensor in (*module.parameters(), *module.buffers())}
    dtypes |= {leaf for leaf in arguments if isinstance(leaf, torch.dtype)}  # what a graph converts to
    return max((TOLERANCES[dtype] for dtype in dtypes & {torch.float16, torch.bfloat16}), default=0.0)


def _outputs(module: fx.GraphModule, calls: list[Any]) -> list[Any]:
    with torch.no_grad(), seeded():
        return [module(*args, **kwargs) for args, kwargs in calls]


def _calls(interface: Interface) -> list[Any]:
    rows = interface.other_batch
    first = (interface.args, interface.kwargs)
    return [first] if rows is None else [first, interface.resized(rows)]


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _check_dtypes(tensors: list[torch.Tensor], target: Format) -> None:
    for tensor in tensors:
        if tensor.dtype in target.unsupported:
            raise InputError(
                f"{target.purpose.removeprefix('Export to ')} files cannot be run on {tensor.dtype} inputs or outputs; "
                "convert the model to torch.float32 or torch.float16, or export to .pt2"
            )


def _check_pieces(
    file: Path,
    open_pieces: Callable[[Names, Collection[str]], Pieces],
    module: fx.GraphModule,
    interface: Interface,
    names: Names,
    calls: list[Any],
    outputs: list[Any],
) -> None:
    """Raises :class:`VerificationError` where a file is off between one quantizer and the next.

    Args:
        file: For messages.
        open_pieces: Opens the file, cut at values.
        module: What the file was written of.
        interface: How it is called.
        names: Names in the file.
        calls: Inputs.
        outputs: What the model gives for each.
    """
    tensors = [index for index, leaf in enumerate(tree_leaves(outputs[0])) if isinstance(leaf, torch.Tensor)]
    cuts = cut_names(module, dict(zip(tensors, names.outputs, strict=True)))
    real = [index for index, name in enumerate(names.outputs) if name not in cuts.values()]
    left = Names(names.inputs, tuple(names.outputs[index] for index in real), names.dims)
    with _engine(file):
        pieces = open_pieces(names, cuts.values())

    def run(*given: Any) -> dict[str, torch.Tensor]:
        with _engine(file):
            return pieces.run(*given)

    for call, output in zip(calls, outputs, strict=True):
        try:
            found = PieceCheck(module, cuts, replace(pieces, run=run)).outputs(interface, call, left.outputs)
        except VerificationError as wrong:
            said = f"{file} was not written: in the file, {wrong}; export to another format"
            raise VerificationError(said) from wrong
        expected = _tensors(output)
        given = [found[name] for name in left.outputs]
        _check(file, left, [expected[index] for index in real], given, rounding=_rounding(module))


def _check(
    file: Path,
    names: Names,
    expected: list[torch.Tensor],
    found: list[torch.Tensor],
    exact: list[torch.Tensor] | None = None,
    rounding: float = 0.0,
) -> float:
    """The largest relative error over all outputs; raises :class:`VerificationError` where it is too large.

    Args:
        file: For messages.
        names: For messages.
        expected: The model's outputs.
        found: Those to check.
        exact: The model's outputs with nothing quantized, if integer kernels may depart from the model.
        rounding: What an engine may add because the model computes in a smaller dtype than the output's.
    """
    worst = 0.0
    rounds_apart = exact is not None and format_of(file).open_pieces is not None
    compared = measure_outputs if rounds_apart else compare_outputs  # classes follow the engine's rounding
    for index, (name, reference, value) in enumerate(zip(names.outputs, expected, found, strict=True)):
        batch = f"with input rows as in output shape {tuple(reference.shape)}"
        try:
            error = compared([reference.cpu()], [value.cpu()])
        except VerificationError as wrong:
            reason = str(wrong).removeprefix("output 0 ")
            raise VerificationError(f"{file} was not written: output {name!r} {reason} ({batch})") from wrong
        allowed = TOLERANCES.get(reference.dtype, 0.0)
        if allowed:  # integers have to be equal
            allowed = max(allowed, rounding)
        if not error.max_rel_error <= allowed:
            said = (
                f"{file} was not written: output {name!r} differs from the model by {error.max_rel_error:.2e} of its "
                f"largest value (allowed: {allowed:.0e}; {batch})"
            )
            if exact is None:
                raise VerificationError(f"{said}; export to another format, and report it")
            noise = measure_outputs([exact[index].cpu()], [reference.cpu()])
            margin = margin_db(reference.numel()) if rounds_apart else ENGINE_MARGIN_DB
            if not is_near(error, noise, margin):
                raise VerificationError(_other_kernels(file, said, error, noise))
        worst = max(worst, error.max_rel_error)
    return worst


def margin_db(numbers: int) -> float:
    """``ENGINE_MARGIN_DB``, and more where an output has few numbers: for files that were found right in pieces.

    The power of noise that is estimated from ``n`` numbers has a standard deviation of ``4.34 * sqrt(2 / n)`` dB, the
    ratio of two such ``8.7 / sqrt(n)``; three of those are allowed.
    """
    return max(ENGINE_MARGIN_DB, 3 + 3 * 8.7 / math.sqrt(max(numbers, 1)))


def is_near(error: Comparison, noise: Comparison, margin: float = ENGINE_MARGIN_DB) -> bool:
    """Whether an engine's integer kernels are as near to the model as its own quantization explains."""
    return error.sqnr_db >= min(noise.sqnr_db - margin, ENGINE_SQNR_DB)


def _other_kernels(file: Path, said: str, error: Comparison, noise: Comparison) -> str:
    remedy = _SATURATED if format_of(file).open_pieces is not None else _UNKNOWN
    return (
        f"{said}, an SQNR of {error.sqnr_db:.1f} dB where the model's own quantization has {noise.sqnr_db:.1f} dB. "
        f"{remedy}"
    )


def tensor_names(interface: Interface, output: Any) -> Names:
    """Names after the caller's parameters and the keys of the output."""
    taken: set[str] = set()
    leaves = tree_flatten_with_path((interface.args, interface.kwargs))[0]
    tensors = [(index, path) for index, (path, leaf) in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    inputs = [_fresh(_input_label(path, interface), taken) for _, path in tensors]
    results = tree_flatten_with_path(output)[0]
    outputs = [_fresh(_output_label(path), taken) for path, leaf in results if isinstance(leaf, torch.Tensor)]
    names = {index: name for (index, _), name in zip(tensors, inputs, strict=True)}
    dims = tuple(
        {dim: _dim_name(interface, names, index, dim) for dim in interface.dynamic.get(index, ())}
        for index, _ in tensors
    )
    return Names(tuple(inputs), tuple(outputs), dims)


def _dim_name(interface: Interface, names: dict[int, str], index: int, dim: int) -> str:
    """``batch``, or the first input and dim of that size (``tokens_dim1``)."""
    index, dim = interface.tied.get((index, dim), (index, dim))
    return "batch" if interface.batch.get(index) == dim else f"{names[index]}_dim{dim}"


def _input_label(path: tuple[Any, ...], interface: Interface) -> str:
    top = interface.names[path[1].idx] if path[0].idx == 0 else str(path[1].key)
    return top + keystr(path[2:])


def _output_label(path: tuple[Any, ...]) -> str:
    label = keystr(path)
    return f"output{label}" if not label or re.fullmatch(r"(\[\d+\])+", label) else label


def _fresh(label: str, taken: set[str]) -> str:
    stem = re.sub(r"\W+", "_", label).strip("_") or "value"
    name, count = stem, 1
    while name in taken:
        name, count = f"{stem}_{count}", count + 1
    taken.add(name)
    return name
