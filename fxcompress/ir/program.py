"""The Program: a model in normal form, with what is needed to run, check and report on it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from fxcompress.formatting import PARAMS, counted

if TYPE_CHECKING:
    from fxcompress.pass_base import Analysis

_TABLES = frozenset({dict, set, OrderedDict})

CONSTANTS = "constants"
"""Name of the submodule that holds folded constants as non-persistent buffers."""


@dataclass(frozen=True)
class Diagnostic:
    """Something a user should know about how a model was read.

    Attributes:
        code: Stable kebab-case identifier, for example ``training-only``.
        message: What was found and what follows from it.
        path: Qualified module or parameter name it is about, if any.
    """

    code: str
    message: str
    path: str | None = None

    def __str__(self) -> str:
        where = f" [{self.path}]" if self.path else ""
        return f"{self.code}{where}: {self.message}"


@dataclass(frozen=True)
class Interface:
    """How callers call the model, kept apart from the flat graph.

    Attributes:
        args: Example positional inputs.
        kwargs: Example keyword inputs.
        in_spec: Tree of ``(args, kwargs)``; its leaves are the graph's placeholders in order.
        out_spec: Tree of the output; its leaves are the graph's outputs in order.
        names: Parameter name of each top-level input in call order.
        dynamic: Leaf index -> dims whose size may change from call to call.
        batch: Leaf index -> the batch dim, for leaves that have one.
        tied: ``(leaf index, dim)`` of dynamic dims -> the first of those that have the same size in every call.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    in_spec: TreeSpec
    out_spec: TreeSpec
    names: tuple[str, ...]
    dynamic: dict[int, tuple[int, ...]] = field(default_factory=dict)
    batch: dict[int, int] = field(default_factory=dict)
    tied: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)

    @property
    def leaves(self) -> list[Any]:
        """The example inputs, flat."""
        return tree_flatten((self.args, self.kwargs))[0]

    def resized(self, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The example inputs with ``batch`` rows, made by repeating rows."""
        leaves = [leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in self.leaves]
        for index, dim in self.batch.items():
            leaves[index] = first_rows(leaves[index], dim, batch)
        args, kwargs = tree_unflatten(leaves, self.in_spec)
        return args, kwargs

    @property
    def other_batch(self) -> int | None:
        """A batch size to check at beside the example's; small, since the example's may be large."""
        rows = self.batch_size
        return None if rows is None else 3 if rows == 2 else 2

    @property
    def batch_size(self) -> int | None:
        """Rows of the example inputs, or ``None`` when no input has a batch dim."""
        leaves = self.leaves
        return next((leaves[index].shape[dim] for index, dim in self.batch.items()), None)


def first_rows(tensor: torch.Tensor, dim: int, rows: int) -> torch.Tensor:
    """The first ``rows`` slices of a tensor along ``dim``; starts again where there are not as many."""
    return tensor.index_select(dim, torch.arange(rows, device=tensor.device) % tensor.shape[dim])


class Program:
    """A model in normal form.

    ``graph_module`` has one placeholder per input leaf and returns a flat tuple of output leaves; ``interface`` knows
    the caller's structure. Weights are shared with the model it was traced from until a pass replaces them, so passes
    put new tensors in place and never write into old ones. :meth:`emit` gives a module of the caller's structure with
    weights of its own.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        interface: Interface,
        diagnostics: tuple[Diagnostic, ...] = (),
        name: str = "Model",
    ) -> None:
        self.graph_module = graph_module
        self.interface = interface
        self.diagnostics = list(diagnostics)
        self.name = name
        self._analyses: dict[Analysis[Any], Any] = {}

    @property
    def graph(self) -> fx.Graph:
        return self.graph_module.graph

    @property
    def nodes(self) -> Iterator[fx.Node]:
        return iter(self.graph_module.graph.nodes)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the Program with the caller's inputs and gives the caller's output structure."""
        leaves = self.flatten_inputs(args, kwargs)
        return tree_unflatten(list(self.graph_module(*leaves)), self.interface.out_spec)

    def flatten_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The leaves of a call, in placeholder order; raises :class:`InputError` if they do not fit."""
        from fxcompress.tracing.inputs import flatten_call

        return flatten_call(self.interface, args, kwargs)

    def flatten_batch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """As :meth:`flatten_inputs`, with real numbers in the precision of the example inputs."""
        from fxcompress.tracing.inputs import flatten_batch

        return flatten_batch(self.interface, args, kwargs)

    def copy(self) -> Program:
        """A Program with a graph and module shells of its own that shares every tensor with this one.

        Its Python code is generated when it is first run.
        """
        graph = copy_graph(self.graph_module.graph)
        clone = clone_graph_module(self.graph_module, graph, lambda tensor: tensor, kind=_LazyGraphModule)
        program = Program(clone, self.interface, tuple(self.diagnostics), self.name)
        program._analyses = dict(self._analyses)
        return program

    def emit(self) -> fx.GraphModule:
        """A trainable, picklable ``torch.fx.GraphModule`` with the caller's signature and weights of its own."""
        from fxcompress.ir.emit import emit

        return emit(self)

    def analyze(self, analysis: Analysis[Any] | str) -> Any:
        """The value of an analysis, computed once and kept until a transform drops it."""
        from fxcompress.analysis import analyze

        return analyze(self, analysis)

    def text(self) -> str:
        """The graph as stable, readable text, one node a line."""
        from fxcompress.ir.printer import program_text

        return program_text(self)

    def __repr__(self) -> str:
        return f"Program({self.name}: {self.summary()})"

    def summary(self) -> str:
        """How much there is of it, in words: ``69 operations, 11.690 M parameters``."""
        calls = sum(node.op in ("call_module", "call_function") for node in self.nodes)
        parameters = sum(parameter.numel() for parameter in self.graph_module.parameters())
        return f"{counted(calls, 'operation')}, {PARAMS.text(parameters)} parameters"


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy of a graph with nodes of the same names."""
    clone = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        # Arguments are put in afterwards: those given to create_node are searched for symbolic sizes, leaf by leaf.
        made[node] = copied = clone.create_node(node.op, node.target, name=node.name, type_expr=node.type)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), made.__getitem__)
        copied._update_args_kwargs(args, kwargs)
        copied.meta.update(node.meta)
    return clone


def clone_graph_module(
    source: fx.GraphModule,
    graph: fx.Graph,
    take: Callable[[torch.Tensor], torch.Tensor],
    extra: Mapping[str, nn.Module] | None = None,
    kind: type[fx.GraphModule] = fx.GraphModule,
) -> fx.GraphModule:
    """A ``GraphModule`` for ``graph`` with module objects of its own, and what ``take`` gives for each tensor.

    What is shared stays shared; ``extra`` modules are added by name.
    """
    tensors: dict[int, torch.Tensor] = {}
    modules: dict[int, nn.Module] = {}

    def tensor_of(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        if id(tensor) not in tensors:
            tensors[id(tensor)] = take(tensor)
        return tensors[id(tensor)]

    def shell(module: nn.Module) -> nn.Module:
        if id(module) not in modules:
            made = nn.Module() if module is source else module.__new__(type(module))
            modules[id(module)] = made
            if module is not source:
                made.__dict__ = {k: v.copy() if type(v) in _TABLES else v for k, v in module.__dict__.items()}
            made.__dict__["_parameters"] = {name: tensor_of(tensor) for name, tensor in module._parameters.items()}
            made.__dict__["_buffers"] = {name: tensor_of(tensor) for name, tensor in module._buffers.items()}
            made.__dict__["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
            made.__dict__["_modules"] = {
                name: child if child is None else shell(child) for name, child in module._modules.items()
            }
        return modules[id(module)]

    root = shell(source)
    root._modules.update(extra or {})
    clone = graph_module_of(root, graph, kind)
    clone.training = source.training
    return clone


def graph_module_of(root: nn.Module, graph: fx.Graph, kind: type[fx.GraphModule] = fx.GraphModule) -> fx.GraphModule:
    """A ``GraphModule`` for a graph that takes over all of ``root``'s state.

    ``fx.GraphModule`` alone keeps what the graph names, and (before torch 2.14) forgets which buffers are not saved.
    """
    made = kind({}, fx.Graph(tracer_cls=graph._tracer_cls))
    made.training = root.training
    for table in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        made.__dict__[table] = root.__dict__[table]
    made.graph = graph
    return made
