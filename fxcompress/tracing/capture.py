"""Capture with torch.export, and the exported graph as a flat ``GraphModule`` that reads its state by name."""

from __future__ import annotations

import io
import operator
from collections import defaultdict
from contextlib import redirect_stderr
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils._pytree import tree_unflatten

from fxcompress.errors import CaptureError
from fxcompress.ir.ops import free_name, is_operation, set_state
from fxcompress.ir.program import CONSTANTS, graph_module_of
from fxcompress.tracing.inputs import ExampleInputs

hop = torch.ops.higher_order


def export(model: nn.Module, inputs: ExampleInputs) -> ExportedProgram:
    """Exports a model in eval mode with its dynamic dims.

    Raises:
        CaptureError: torch.export cannot capture the model.
    """
    leaves = [_prepared(leaf, inputs.batch.get(index)) for index, leaf in enumerate(inputs.leaves)]
    args, kwargs = tree_unflatten(leaves, inputs.spec)
    shapes: Any = ShapesCollection()  # type: ignore[no-untyped-call]
    for index, dims in inputs.dynamic.items():
        shapes[leaves[index]] = {dim: Dim.DYNAMIC if inputs.demanded(index, dim) else Dim.AUTO for dim in dims}

    def attempt() -> ExportedProgram:
        dynamic_shapes = shapes.dynamic_shapes(model, args, kwargs) if inputs.dynamic else None
        with redirect_stderr(io.StringIO()):  # a failing export prints the whole graph it has so far
            return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)

    try:
        try:
            return attempt()
        except RuntimeError as error:
            if "modified inplace" not in str(error):
                raise
            with torch.no_grad():  # autograd forbids some writes that inference allows and that have a functional form
                return attempt()
    except Exception as error:
        raise CaptureError(_explain(model, error)) from error


def _prepared(leaf: Any, batch_dim: int | None) -> Any:
    """A leaf for export: a tensor object of its own, since export marks it, and no dynamic dim of size 1.

    torch.export treats a size of 1 as a constant, so one row becomes two.
    """
    if not isinstance(leaf, torch.Tensor):
        return leaf
    own = leaf.detach().requires_grad_(leaf.requires_grad)
    return torch.cat([own, own], batch_dim) if batch_dim is not None and own.shape[batch_dim] == 1 else own


def _explain(model: nn.Module, error: Exception) -> str:
    name = type(model).__name__
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    reason = next((line for line in lines if line.startswith("You marked")), lines[0] if lines else "no message")
    place = _user_frame(error)
    text = str(error)
    if "data-dependent" in text.lower() or "GuardOnDataDependent" in type(error).__name__ or "unbacked" in text.lower():
        remedy = (
            "its control flow depends on the values of a tensor: rewrite that with torch.where, or use "
            "fxcompress.trace_islands, which captures the parts that can be and leaves the rest in Python"
        )
    elif "specializ" in text or "onstraint" in text:
        remedy = (
            "a dim marked dynamic must be constant in this model: pass batch_dim=None for a fixed batch, or leave that "
            "dim out of dynamic"
        )
    else:
        remedy = "use fxcompress.trace_islands to capture the parts of it that can be"
    return f"{name} cannot be captured{place}: {type(error).__name__}: {reason}. Remedy: {remedy}"


def _user_frame(error: BaseException) -> str:
    place = ""
    trace = error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if not any(part in file for part in ("/torch/", "fxcompress/tracing", "<")):
            place = f" at {file}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


def lift(exported: ExportedProgram) -> fx.GraphModule:
    """The exported graph with parameters read by ``get_attr``, wrapped regions inlined, and a flat output tuple.

    Raises:
        CaptureError: The program mutates buffers or uses a construct that has no place in a Program.
    """
    graph = fx.Graph()
    root = nn.Module()
    values: dict[fx.Node, Any] = {}
    specs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    canonical = canonical_names(exported)
    reads: dict[str, fx.Node] = {}
    inputs: list[tuple[fx.Node, Any]] = []
    for node in exported.graph.nodes:
        if node.op != "placeholder":
            continue
        spec = specs[node.name]
        if spec.kind is InputKind.USER_INPUT:
            inputs.append((node, spec))
            continue
        if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            raise CaptureError(
                f"the exported program holds a {spec.kind.name.lower()} input {node.name!r}, which a "
                "Program cannot hold; trace the original model without it"
            )
    for node, _ in inputs:
        values[node] = graph.placeholder(node.name)
        values[node].meta = dict(node.meta)
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            if node not in values:
                values[node] = _read_state(graph, root, exported, node, specs[node.name], canonical, reads)
        elif node.op == "output":
            _output(graph, exported, node, values)
        else:
            _copy(graph, exported.graph_module, node, values)
    return graph_module_of(root, graph)


def canonical_names(exported: ExportedProgram) -> dict[str, str]:
    """State name -> the first of the names that share its tensor."""
    by_tensor: dict[int, str] = {}
    return {name: by_tensor.setdefault(id(tensor), name) for name, tensor in exported.state_dict.items()}


def aliases(exported: ExportedProgram) -> dict[str, list[str]]:
    """First name of each parameter or buffer -> every name it has in the model's state_dict."""
    names: dict[str, list[str]] = defaultdict(list)
    for name, first in canonical_names(exported).items():
        names[first].append(name)
    return dict(names)


def _read_state(
    graph: fx.Graph,
    root: nn.Module,
    exported: ExportedProgram,
    node: fx.Node,
    spec: Any,
    canonical: dict[str, str],
    reads: dict[str, fx.Node],
) -> fx.Node:
    persistent = spec.kind is InputKind.PARAMETER or (spec.kind is InputKind.BUFFER and spec.persistent)
    name = canonical.get(spec.target, spec.target)
    tensor = exported.state_dict[name] if name in exported.state_dict else exported.constants[spec.target]
    key = name if persistent else f"{id(tensor)} saved nowhere"
    if key not in reads:
        if not persistent:  # its name is free, so a raised layer need not carry it
            leaf = spec.target.removeprefix(f"{CONSTANTS}.").replace(".", "_")
            name = f"{CONSTANTS}.{free_name(root, CONSTANTS, leaf)}"
        set_state(root, name, tensor, persistent=persistent)
        reads[key] = graph.create_node("get_attr", name, name=name.replace(".", "_"))
        reads[key].meta = dict(node.meta)
    return reads[key]


def _output(graph: fx.Graph, exported: ExportedProgram, node: fx.Node, values: dict[fx.Node, Any]) -> None:
    leaves = []
    for spec, value in zip(exported.graph_signature.output_specs, node.args[0], strict=True):  # type: ignore[arg-type]
        if spec.kind is not OutputKind.USER_OUTPUT:
            raise CaptureError(
                f"the model changes its own state in eval mode ({spec.target!r}); a Program is a pure function: "
                "pass the state as an input, or use fxcompress.trace_islands"
            )
        leaves.append(values[value] if isinstance(value, fx.Node) else value)
    graph.output(tuple(leaves))


def _copy(graph: fx.Graph, owner: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any]) -> None:
    if node.op == "get_attr":
        values[node] = getattr(owner, str(node.target))  # a subgraph, consumed by the wrapper that calls it
        return
    if node.target is hop.wrap_with_set_grad_enabled:
        enabled, subgraph, *operands = node.args
        results = _inline(graph, values[subgraph], [_value(values, operand) for operand in operands])  # type: ignore[index]
        values[node] = results if enabled else [_detached(graph, result) for result in results]
        return
    if node.target is hop.wrap_with_autocast:
        _, _, enabled, _, subgraph, *operands = node.args
        if enabled:
            raise CaptureError(
                "the model enters torch.autocast inside its forward; a Program states every dtype: "
                "leave autocast out of forward and use the cast pass"
            )
        values[node] = _inline(graph, values[subgraph], [_value(values, operand) for operand in operands])  # type: ignore[index]
        return
    if node.target is operator.getitem and isinstance(values.get(node.args[0]), (list, tuple)):  # type: ignore[arg-type]
        values[node] = values[node.args[0]][node.args[1]]  # type: ignore[index]
        return
    if any(isinstance(values.get(operand), fx.GraphModule) for operand in node.all_input_nodes):
        raise CaptureError(
            f"the model uses {node.target}, a control-flow operator with subgraphs, which a Program cannot "
            "hold; use fxcompress.trace_islands for the parts around it"
        )
    if node.op == "call_function" and not is_operation(node.target):
        raise CaptureError(
            f"the model calls {getattr(node.target, '__name__', node.target)} (a function transform such as vmap, or "
            "Python code that torch.export does not look into), which a Program cannot hold; write it with tensor "
            "operations, or use fxcompress.trace_islands for the parts around it"
        )
    values[node] = graph.node_copy(node, lambda operand: values[operand])


def _value(values: dict[fx.Node, Any], operand: Any) -> Any:
    return values[operand] if isinstance(operand, fx.Node) else operand


def _inline(graph: fx.Graph, subgraph: fx.GraphModule, operands: list[Any]) -> list[Any]:
    """Copies a wrapped region into the graph; gives its outputs."""
    values: dict[fx.Node, Any] = {}
    given = iter(operands)
    for node in subgraph.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(given)
        elif node.op == "output":
            (results,) = node.args
            many = results if isinstance(results, (list, tuple)) else [results]
            return [_value(values, result) for result in many]
        else:
            _copy(graph, subgraph, node, values)
    return []


def _detached(graph: fx.Graph, result: Any) -> Any:
    """Results of a no_grad region carry no gradient, also when the region is inlined."""
    val = result.meta.get("val") if isinstance(result, fx.Node) else None
    if not isinstance(val, torch.Tensor) or not val.is_floating_point():
        return result
    detached = graph.call_function(torch.ops.aten.detach.default, (result,))
    detached.meta = dict(result.meta)
    return detached
