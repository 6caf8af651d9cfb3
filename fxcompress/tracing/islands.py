"""Islands: the largest submodules that can be captured, of a model that cannot be captured whole.

Data-dependent control flow (non-maximum suppression, proposal sampling) stays in Python; the networks around it become
Programs. What each island is called with is recorded in one real forward.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_flatten, tree_leaves

from fxcompress.errors import CaptureError, FxCompressError, InputError, VerificationError
from fxcompress.formatting import counted
from fxcompress.ir.emit import with_signature
from fxcompress.ir.program import Diagnostic, Program
from fxcompress.tracing.inputs import prepare, split_call
from fxcompress.tracing.tracer import capture, check_weights
from fxcompress.tracing.untouched import borrowed, kept_state, seeded
from fxcompress.verification.numerics import compare_outputs, rounding_tolerance

logger = logging.getLogger(__name__)


@dataclass(frozen=True, repr=False)
class PartialProgram:
    """A model of which only parts are Programs.

    Attributes:
        model: The model, unchanged; its own code runs between the islands.
        islands: Qualified name of a submodule -> its Program.
        args: Example positional inputs of the model.
        kwargs: Example keyword inputs of the model.
        diagnostics: What was left in Python, and why.
    """

    model: nn.Module
    islands: Mapping[str, Program]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    diagnostics: tuple[Diagnostic, ...] = ()

    def emit(self) -> nn.Module:
        """A copy of the model, in eval mode, with every island replaced by its trainable ``GraphModule``."""
        copies: dict[int, Any] = {}  # one for all, so that weights tied across islands stay tied
        host = copy.deepcopy(self.model, copies).eval()
        for path, island in self.islands.items():
            emitted = with_signature(island, lambda tensor: copy.deepcopy(tensor, copies))
            _put(host, path, _with_attributes(emitted, host.get_submodule(path)))
        return host

    def with_islands(self, islands: Mapping[str, Program]) -> PartialProgram:
        """The same model around other Programs, for example compressed ones.

        Raises:
            InputError: ``islands`` are not those of this model.
        """
        if set(islands) != set(self.islands):
            raise InputError(f"the islands of this model are {sorted(self.islands)}, not {sorted(islands)}")
        return replace(self, islands=dict(islands))

    def __repr__(self) -> str:
        islands = ", ".join(f"{path} ({island.summary()})" for path, island in self.islands.items())
        return f"PartialProgram({type(self.model).__name__}: {counted(len(self.islands), 'island')}: {islands})"


def trace_islands(model: nn.Module, example_inputs: Any) -> PartialProgram:
    """Captures the largest submodules of a model that can be captured.

    Every dim of an island's inputs is dynamic unless its weights fix it, since the code around it may call it with any
    size.

    Args:
        model: A model that :func:`fxcompress.trace` cannot capture whole.
        example_inputs: As for :func:`fxcompress.trace`; one forward runs with them.

    Raises:
        InputError: The model fails on the example inputs, or holds NaN.
        CaptureError: No part of it can be captured.
        VerificationError: The model with its islands gives another output.
    """
    args, kwargs = split_call(example_inputs)
    check_weights(model)
    with borrowed(model):
        calls, reference = _record(model, args, kwargs)
        islands: dict[str, Program] = {}
        left: list[Diagnostic] = []
        _explore(model, "", calls, islands, left)
    if not islands:
        raise CaptureError(f"no part of {type(model).__name__} can be captured:\n  " + "\n  ".join(map(str, left[:5])))
    partial = PartialProgram(model, islands, args, kwargs, tuple(left))
    _verify(partial, reference)
    return partial


@dataclass(frozen=True)
class _Call:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def form(self) -> Any:
        """What an island cannot change from call to call: structure, ranks, dtypes, and values that are no tensors."""
        leaves, spec = tree_flatten((self.args, self.kwargs))
        return spec, [(v.dim(), v.dtype) if isinstance(v, torch.Tensor) else v for v in leaves]


def _record(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[nn.Module, _Call | None], Any]:
    """The call of every submodule in a real forward, ``None`` where calls differ in form.

    A global hook leaves the model's own hooks alone.
    """
    calls: dict[nn.Module, _Call | None] = {}

    def note(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        call = _Call(given, named)
        first = calls.setdefault(module, call)
        if first is not None and first.form != call.form:
            calls[module] = None

    handle = register_module_forward_hook(note, with_kwargs=True)
    try:
        with torch.no_grad(), seeded(), kept_state(model):
            return calls, model(*args, **kwargs)
    except Exception as error:
        raise InputError(f"{type(model).__name__} itself fails on the example inputs: {error}") from error
    finally:
        handle.remove()


def _explore(
    module: nn.Module,
    path: str,
    calls: Mapping[nn.Module, _Call | None],
    islands: dict[str, Program],
    left: list[Diagnostic],
) -> None:
    """Captures ``module`` if it can be; otherwise tries its children."""
    if not any(True for _ in module.parameters()):
        return
    if path and module in calls:
        try:
            islands[path] = _capture(module, calls[module])
            logger.info("island %s: %r", path, islands[path])
            return
        except FxCompressError as error:
            left.append(Diagnostic("left-in-python", str(error).splitlines()[0], path))
    for name, child in module.named_children():
        _explore(child, f"{path}.{name}".lstrip("."), calls, islands, left)


def _capture(module: nn.Module, call: _Call | None) -> Program:
    if call is None:
        raise CaptureError(
            f"{type(module).__name__} is called in more than one way: structure, rank, dtype or a value that is no "
            "tensor differs from call to call"
        )
    program = capture(module, prepare(module, (call.args, call.kwargs)).with_all_dims())
    if any(diagnostic.code == "output-dropped" for diagnostic in program.diagnostics):
        raise CaptureError(f"{type(module).__name__} gives objects that the code around it may need")
    return program


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    """Replaces a submodule under every name it has."""
    old = root.get_submodule(path)
    for parent in list(root.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = module


def _with_attributes(island: fx.GraphModule, original: nn.Module) -> fx.GraphModule:
    """Plain attributes of the original, which the code around it may read (``backbone.out_channels``)."""
    for name, value in original.__dict__.items():
        if name not in island.__dict__ and not name.startswith("_"):
            island.__dict__[name] = value
    return island


def _verify(partial: PartialProgram, reference: Any) -> None:
    with torch.no_grad(), seeded():
        found = tree_leaves(partial.emit()(*partial.args, **partial.kwargs))
    expected = tree_leaves(reference)
    comparison = compare_outputs(expected, found)
    if not comparison.max_rel_error <= rounding_tolerance(expected):
        raise VerificationError(
            f"{type(partial.model).__name__} with its islands gives another output ({comparison}); islands: "
            f"{', '.join(partial.islands)}"
        )
