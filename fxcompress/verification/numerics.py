"""Numeric verification: what a Program computes, against the model it came from or the Program before a pass."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_flatten

from fxcompress.errors import CaptureError, VerificationError
from fxcompress.ir.program import Interface, Program, first_rows
from fxcompress.tracing.untouched import seeded
from fxcompress.verification.widened import widened

logger = logging.getLogger(__name__)

EXACT_TOLERANCE = 1e-9
"""Largest error of an exact rewrite, computed in float64, relative to the largest reference value."""

_ULPS = 64
_WORST_RELATIVE = 0.02
_FEW_ROWS = 4


@dataclass(frozen=True)
class Comparison:
    """Difference between two runs.

    Attributes:
        max_abs_error: Largest absolute difference over all outputs.
        max_rel_error: The same, relative to the largest reference magnitude of its output.
        sqnr_db: Signal to quantization-noise ratio in dB, ``inf`` when bit-equal.
        exact: Whether all outputs are bit-equal.
        discrete_changed: Share of the elements of an output of integers or booleans (classes, masks) that differ.
    """

    max_abs_error: float
    max_rel_error: float
    sqnr_db: float
    exact: bool
    discrete_changed: float = 0.0

    def __str__(self) -> str:
        if self.exact:
            return "bit-equal"
        discrete = f", {self.discrete_changed:.1%} of discrete outputs changed" if self.discrete_changed else ""
        return f"max rel error {self.max_rel_error:.2e}, SQNR {self.sqnr_db:.1f} dB{discrete}"


def measure(before: Program, after: Program) -> Comparison:
    """How much two Programs of one interface differ on the example inputs, at two batch sizes.

    Raises:
        VerificationError: The outputs differ in number, shape or dtype, or only ``after`` gives NaN.
    """
    return worst([measure_outputs(run(before, leaves), run(after, leaves)) for leaves in input_sets(before.interface)])


def compare(before: Program, after: Program) -> Comparison:
    """Like :func:`measure`, where outputs of integers or booleans must be equal."""
    return worst([compare_outputs(run(before, leaves), run(after, leaves)) for leaves in input_sets(before.interface)])


def check_exact(before: Program, after: Program, rewrite: Callable[[Program], object]) -> Comparison:
    """Like :func:`compare`, for a rewrite that must not change the output.

    Where the outputs are not bit-equal, two questions separate rounding from error. Does the rewritten Program, run in
    float64, differ by no more than the rounding of its stored weights? And does the same rewrite, done on a float64
    copy of the Program, agree to float64 rounding?

    Args:
        before: The Program before the rewrite.
        after: The Program after it.
        rewrite: Does the rewrite in place on another Program.

    Raises:
        VerificationError: The outputs differ by more than rounding.
    """
    native = compare(before, after)
    if native.exact:
        return native
    reference = widened(before)
    stored = compare(reference, widened(after))
    allowed = rounding_tolerance(_floating_state(after))
    if not stored.max_rel_error <= allowed:
        raise VerificationError(
            f"the rewrite must be exact, but the output differs by {stored.max_rel_error:.2e} of its largest value, "
            f"more than rounding the weights explains ({allowed:.0e})"
        )
    rewritten = reference.copy()
    rewrite(rewritten)
    rewritten.graph_module.recompile()
    double = compare(reference, rewritten)
    if not double.max_rel_error <= EXACT_TOLERANCE:
        raise VerificationError(
            f"the rewrite must be exact, but done in float64 it changes the output by {double.max_rel_error:.2e} of "
            f"its largest value (allowed: {EXACT_TOLERANCE:.0e})"
        )
    return native


def _floating_state(program: Program) -> list[torch.Tensor]:
    root = program.graph_module
    return [tensor for tensor in (*root.parameters(), *root.buffers()) if _floating(tensor)]


def check_against_model(program: Program, model: nn.Module, reference: Any) -> None:
    """Compares a traced Program with the model itself, at the traced batch and at another.

    What a heavy model computes costs more than its capture, so the model's known output is used for both: at another
    batch the Program must give the rows of it that belong to the rows it is given. Only where it does not (the model
    mixes rows, or treats one row in another way) the model itself runs again. Of a large batch, few rows are compared.

    Args:
        program: The traced Program.
        model: The model, in eval mode.
        reference: The model's output on the example inputs.

    Raises:
        CaptureError: The model itself fails at the other batch.
        VerificationError: Outputs differ by more than the rounding of their dtype.
    """
    interface = program.interface
    rows = interface.batch_size
    if rows is None or rows <= _FEW_ROWS or not _gives_rows(program, reference, _FEW_ROWS):
        _check_rounding(program, interface.leaves, reference, "the traced batch")
    other = interface.other_batch
    if other is None or _gives_rows(program, reference, 2 if rows == 1 else 1):
        return
    args, kwargs = interface.resized(other)
    with torch.no_grad(), seeded():
        try:
            output = model(*args, **kwargs)
        except Exception as error:
            raise CaptureError(
                f"{program.name} runs on the example inputs but fails at batch {other}: {type(error).__name__}: "
                f"{error}. Pass batch_dim=None for a fixed batch, or inputs that share no accidental size"
            ) from error
    _check_rounding(program, tree_flatten(interface.resized(other))[0], output, f"batch {other}")


def _gives_rows(program: Program, reference: Any, rows: int) -> bool:
    """Whether the Program, given the first rows of the example inputs, gives those rows of the reference."""
    try:
        expected = _first_rows(program, tree_flatten(reference)[0], rows)
        found = compare_outputs(expected, run(program, tree_flatten(program.interface.resized(rows))[0]))
    except Exception as error:  # a graph captured for two rows or more need not run on one
        logger.debug("%s at batch %d: %s", program.name, rows, error)
        return False
    return found.max_rel_error <= rounding_tolerance(expected)


def _first_rows(program: Program, outputs: list[Any], rows: int) -> list[Any]:
    """The first rows of outputs, along the dims that have the size of the batch."""
    given = program.graph.find_nodes(op="placeholder")
    batch = {given[index].meta["val"].shape[dim].node.expr for index, dim in program.interface.batch.items()}
    cut = list(outputs)
    for index, node in enumerate(program.graph.output_node().args[0]):  # type: ignore[arg-type]
        shape = getattr(node.meta["val"], "shape", ()) if isinstance(node, fx.Node) else ()
        for dim, size in enumerate(shape):
            if isinstance(size, torch.SymInt) and size.node.expr in batch:
                cut[index] = first_rows(cut[index], dim, rows)
    return cut


def _check_rounding(program: Program, leaves: list[Any], reference: Any, where: str) -> None:
    expected = tree_flatten(reference)[0]
    found = compare_outputs(expected, run(program, leaves))
    allowed = rounding_tolerance(expected)
    if not found.max_rel_error <= allowed:
        raise VerificationError(
            f"the traced Program differs from {program.name} at {where} by {found.max_rel_error:.2e} of the largest "
            f"output (allowed: {allowed:.2e}); the model may be random in eval mode or depend on the batch size"
        )


def rounding_tolerance(outputs: list[Any]) -> float:
    """Largest relative error that another order of the same operations may make in the outputs' dtype."""
    eps = max((torch.finfo(output.dtype).eps for output in outputs if _floating(output)), default=0.0)
    return min(_ULPS * eps, _WORST_RELATIVE)


def _floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def run(program: Program, leaves: list[Any]) -> list[Any]:
    """The flat outputs of a Program for flat inputs, with random numbers that are the same each time."""
    with torch.no_grad(), seeded():
        return list(program.graph_module(*leaves))


def input_sets(interface: Interface) -> list[list[Any]]:
    """The flat example inputs at their own batch size and, where the batch may change, at another."""
    rows = interface.other_batch
    sets = [interface.leaves]
    if rows is not None:
        sets.append(tree_flatten(interface.resized(rows))[0])
    return sets


def compare_outputs(expected: list[Any], found: list[Any]) -> Comparison:
    """Compares two flat lists of outputs; a difference in structure, shape, dtype or discrete values is an error."""
    parts = _leaves(expected, found)
    for index, part in enumerate(parts):
        if part.discrete_changed:
            given = expected[index]
            share = f"{round(part.discrete_changed * given.numel())} of {given.numel()} elements"
            raise VerificationError(f"output {index} ({given.dtype}) differs in {share}")
    return worst(parts)


def measure_outputs(expected: list[Any], found: list[Any]) -> Comparison:
    """Compares two flat lists of outputs; a difference in structure, shape or dtype is an error."""
    return worst(_leaves(expected, found))


def _leaves(expected: list[Any], found: list[Any]) -> list[Comparison]:
    if len(expected) != len(found):
        raise VerificationError(f"{len(found)} outputs where {len(expected)} are expected")
    return [_leaf(i, a, b) for i, (a, b) in enumerate(zip(expected, found, strict=True))]


def worst(parts: list[Comparison]) -> Comparison:
    """The largest errors of several comparisons."""
    return Comparison(
        max((part.max_abs_error for part in parts), default=0.0),
        max((part.max_rel_error for part in parts), default=0.0),
        min((part.sqnr_db for part in parts), default=math.inf),
        all(part.exact for part in parts),
        max((part.discrete_changed for part in parts), default=0.0),
    )


def _leaf(index: int, a: Any, b: Any) -> Comparison:
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        if type(a) is not type(b) or a != b:
            raise VerificationError(f"output {index} is {b!r} where {a!r} is expected")
        return Comparison(0.0, 0.0, math.inf, True)
    if a.shape != b.shape or a.dtype != b.dtype:
        raise VerificationError(
            f"output {index} is {b.dtype} {tuple(b.shape)} where {a.dtype} {tuple(a.shape)} is expected"
        )
    if torch.equal(a, b):
        return Comparison(0.0, 0.0, math.inf, True)
    if not _floating(a):
        return Comparison(0.0, 0.0, math.inf, False, int((a != b).sum()) / a.numel())
    wide = torch.complex128 if a.is_complex() else torch.float64
    same = (a == b) | (torch.isnan(a) & torch.isnan(b))
    if same.all():
        return Comparison(0.0, 0.0, math.inf, True)
    masked = same & ~torch.isfinite(a)  # infinities of masks compare equal, not by difference
    a, b = torch.where(masked, 0, a.to(wide)), torch.where(masked, 0, b.to(wide))
    if not bool(torch.isfinite(b).all()):
        raise VerificationError(f"output {index} holds NaN or Inf where the reference is finite")
    noise, scale = (a - b).abs(), a.abs().max().item()
    error = noise.max().item()
    signal, power = a.abs().square().sum().item(), noise.square().sum().item()
    sqnr = 10 * math.log10(signal / power) if signal > 0 and power > 0 else -math.inf
    return Comparison(error, error / scale if scale > 0 else math.inf, sqnr, False)
