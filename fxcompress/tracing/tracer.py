"""``trace``: from a model and example inputs to a verified Program."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx.node import map_arg
from torch.nn.parameter import UninitializedParameter
from torch.utils._pytree import tree_flatten

from fxcompress.errors import CaptureError, InputError, VerificationError
from fxcompress.ir.constants import fold_constants
from fxcompress.ir.dead_code import drop_unread_state, eliminate_dead
from fxcompress.ir.ops import set_state, state_read
from fxcompress.ir.program import Diagnostic, Program
from fxcompress.tracing.capture import aliases as state_aliases
from fxcompress.tracing.capture import export, lift
from fxcompress.tracing.functionalize import functionalize
from fxcompress.tracing.inputs import Dynamic, ExampleInputs, prepare
from fxcompress.tracing.normalize import normalize
from fxcompress.tracing.outputs import plain_outputs
from fxcompress.tracing.raising import Aliases, Origin, raise_layers
from fxcompress.tracing.randomness import random_draws
from fxcompress.tracing.training_only import custom_backwards, dropped_state, listing, training_only
from fxcompress.tracing.untouched import borrowed, kept_state, seeded

logger = logging.getLogger(__name__)


def trace(
    model: nn.Module | ExportedProgram,
    example_inputs: Any = None,
    *,
    dynamic: Dynamic | None = None,
    batch_dim: int | None = 0,
) -> Program:
    """Captures a model as a verified Program.

    The model is captured in eval mode with a dynamic batch, whatever mode it is in, and is not changed. The Program
    shares its weights until a pass replaces them.

    Args:
        model: Any module (also a ``torch.fx.GraphModule``), on cpu, cuda or meta, or an ``ExportedProgram``.
        example_inputs: A tensor, a tuple of positional inputs, a dict of keyword inputs, or a pair ``(args, kwargs)``.
            May be left out for an ``ExportedProgram`` that carries its own.
        dynamic: Dims beside the batch that may change from call to call, for example ``{"x": (2, 3)}``.
        batch_dim: The batch dim of every input with as many rows as the first tensor input has; ``None`` for a fixed
            batch.

    Returns:
        The Program, checked against the model on the example inputs at two batch sizes.

    Raises:
        InputError: The example inputs do not fit the model, or it gives NaN or Inf for them.
        CaptureError: The model cannot be captured as a whole; see :func:`fxcompress.trace_islands`.
        VerificationError: The Program does not compute what the model computes (a bug; please report it).
    """
    if isinstance(model, ExportedProgram):
        return _from_exported(model, example_inputs)
    if not isinstance(model, nn.Module):
        raise InputError(f"trace needs a torch.nn.Module or an ExportedProgram, not {type(model).__name__}")
    return capture(model, prepare(model, example_inputs, dynamic, batch_dim))


def capture(model: nn.Module, inputs: ExampleInputs) -> Program:
    """The verified Program of a model for canonical example inputs; raises what :func:`trace` raises."""
    _check_code(model)
    check_weights(model)
    with plain_outputs(model) as dropped, borrowed(model) as loan:
        reference = run_model(model, inputs)
        if dropped and not any(isinstance(leaf, torch.Tensor) for leaf in tree_flatten(reference)[0]):
            raise CaptureError(f"{type(model).__name__} gives no tensor: {dropped[0].message}")
        changed = loan.changed()
        loan.forget_cached()
        started = time.perf_counter()
        with custom_backwards(model) as lost:
            exported = export(model, inputs)
        captured = time.perf_counter()
        loan.forget_cached()
        inputs = inputs.settled(_input_values(exported))
        program = lower(exported, inputs, Origin.of(model), type(model).__name__)
        random = random_draws(program.graph)
        program.diagnostics += [*dropped, *training_only(model, program.graph), *lost, *random]
        try:
            _verify(program, model, reference)
        except VerificationError as error:
            raise _impure(program, changed, random) or error from error
    logger.info(
        "traced %s: torch.export %.2f s, normalise + raise + verify %.2f s",
        type(model).__name__,
        captured - started,
        time.perf_counter() - captured,
    )
    return program


def _from_exported(exported: ExportedProgram, example_inputs: Any) -> Program:
    if example_inputs is None:
        if exported.example_inputs is None:
            raise InputError("the ExportedProgram carries no example inputs: pass example_inputs")
        example_inputs = exported.example_inputs
    model = exported.module()
    inputs = prepare(model, example_inputs, batch_dim=None).with_all_dims()
    inputs = replace(inputs, batch={index: 0 for index, dims in inputs.dynamic.items() if dims})
    inputs = inputs.settled(_input_values(exported))
    reference = run_model(model, inputs)
    origin = Origin(dict(exported.state_dict), frozenset())
    program = lower(exported, inputs, origin, exported.graph_module._get_name())
    _verify(program, model, reference)
    return program


def _input_values(exported: ExportedProgram) -> list[Any]:
    users = {spec.arg.name for spec in exported.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT}
    return [n.meta.get("val") for n in exported.graph.nodes if n.op == "placeholder" and n.name in users]


def _impure(program: Program, changed: list[str], random: list[Diagnostic]) -> CaptureError | None:
    """Why a model gives another output for the same inputs, if the model itself is the reason."""
    if changed:
        return CaptureError(
            f"{program.name} changes its own attributes in forward ({listing(changed)}) and its output depends on "
            "them; a Program is a pure function: pass them as inputs, or use fxcompress.trace_islands"
        )
    if random:
        return CaptureError(
            f"{program.name} is random in eval mode and cannot be compared with its Program: {random[0].message}"
        )
    return None


def check_weights(model: nn.Module) -> None:
    """Raises :class:`InputError` for a weight that is NaN or infinite, or not there yet."""
    for name, tensor in model.named_parameters():
        if isinstance(tensor, UninitializedParameter):
            raise InputError(f"parameter {name!r} of a lazy module has no shape yet: run the model once before tracing")
        if tensor.is_meta or not tensor.is_floating_point() or tensor.is_sparse:
            continue
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(
                f"parameter {name!r} holds NaN or Inf: what it computes cannot be compared; load good weights first"
            )


def _check_code(model: nn.Module) -> None:
    """Raises :class:`InputError` for modules that are not Python code."""
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError(
                f"{path or 'the model'} is a TorchScript module ({module.original_name}), whose code cannot be read; "
                "give the Python module it was made from"
            )


def run_model(model: nn.Module, inputs: ExampleInputs) -> Any:
    """The model's own output on the example inputs, which everything is compared with (``None`` on meta)."""
    if any(isinstance(leaf, torch.Tensor) and leaf.is_meta for leaf in inputs.leaves):
        return None
    with torch.no_grad(), seeded():
        try:
            args, kwargs = inputs.fresh()
            with kept_state(model) as written:
                output = model(*args, **kwargs)
        except Exception as error:
            shapes = ", ".join(
                f"{label}: {leaf.dtype} {tuple(leaf.shape)}" if isinstance(leaf, torch.Tensor) else f"{label}: {leaf!r}"
                for label, leaf in zip(inputs.labels, inputs.leaves, strict=True)
            )
            raise InputError(
                f"{type(model).__name__} itself fails on the example inputs ({shapes}): {type(error).__name__}: "
                f"{next(iter(str(error).strip().splitlines()), '')}. Pass inputs that the model accepts"
            ) from error
    if written:
        raise CaptureError(
            f"{type(model).__name__} writes into its own state in eval mode ({listing(written)}); a Program is a pure "
            "function: pass the state as an input, or use fxcompress.trace_islands"
        )
    for leaf in tree_flatten(output)[0]:
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            # masked scores are -Inf on purpose; what overflows is +Inf
            found = "NaN" if bool(torch.isnan(leaf).any()) else "Inf" if bool(torch.isposinf(leaf).any()) else None
            if found is not None:
                raise InputError(
                    f"{type(model).__name__} gives {found} for the example inputs, which nothing can be compared with; "
                    "pass inputs in the model's normal range"
                )
    return output


def lower(exported: ExportedProgram, inputs: ExampleInputs, origin: Origin, name: str) -> Program:
    """The normal form of an exported program (not yet verified)."""
    names = state_aliases(exported)
    graph_module = lift(exported)
    functionalize(graph_module)
    normalize(graph_module)
    fold_constants(graph_module)
    eliminate_dead(graph_module.graph)
    raise_layers(graph_module, names, origin)
    dropped = _settle_state(graph_module, names, origin)
    graph_module.graph = _renamed(graph_module.graph)
    graph_module.eval()
    out_spec = exported.call_spec.out_spec
    return Program(graph_module, inputs.interface(out_spec), tuple(dropped_state(dropped)), name)


def _renamed(graph: fx.Graph) -> fx.Graph:
    """The same graph with node names that follow from what each node does, not from how it was captured."""
    renamed = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in _reads_at_first_use(graph):
        args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op in ("placeholder", "output"):
            name = node.name
        elif isinstance(node.target, OpOverload):
            name = node.target._schema.name.rpartition("::")[2]
        else:
            name = str(getattr(node.target, "__name__", node.target)).replace(".", "_")
        values[node] = renamed.create_node(node.op, node.target, args, kwargs, name=name)
        values[node].meta = node.meta
    return renamed


def _reads_at_first_use(graph: fx.Graph) -> Iterator[fx.Node]:
    """The nodes in order, with each read of state right before the first node that uses it."""
    pending = set(graph.find_nodes(op="get_attr"))
    for node in graph.nodes:
        if node.op == "get_attr":
            continue
        for operand in node.all_input_nodes:
            if operand in pending:
                pending.remove(operand)
                yield operand
        yield node


def _settle_state(graph_module: fx.GraphModule, names: Aliases, origin: Origin) -> list[str]:
    """Keeps the state that the graph reads, under every name it has in the model; gives the names that are gone."""
    read = {id(tensor) for node in graph_module.graph.nodes for tensor in state_read(graph_module, node).values()}
    present = dict(graph_module.named_parameters(remove_duplicate=False)) | dict(
        graph_module.named_buffers(remove_duplicate=False)
    )
    for every in names.values():
        tensor = next((present[name] for name in every if name in present and id(present[name]) in read), None)
        for alias in every:
            if tensor is not None and alias not in present:
                set_state(graph_module, alias, tensor)
    drop_unread_state(graph_module)
    kept = set(graph_module.state_dict())
    return [name for name in origin.state if name not in kept]


def _verify(program: Program, model: nn.Module, reference: Any) -> None:
    from fxcompress.verification.numerics import check_against_model
    from fxcompress.verification.verifier import verify

    verify(program)
    if reference is not None:
        check_against_model(program, model, reference)
