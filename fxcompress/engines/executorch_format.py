"""ExecuTorch programs: lowered from a torch.export graph to XNNPACK, run by ExecuTorch's runtime on the CPU."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_structure
from torch.utils._sympy.value_ranges import ValueRanges

from fxcompress.engines.circular_pad import join_circular_pads
from fxcompress.engines.integers import QUANTIZED, is_call
from fxcompress.engines.names import Names, Run
from fxcompress.engines.quiet import quiet
from fxcompress.engines.reexport import TensorOutputs, reexport
from fxcompress.errors import ArtifactError, InputError
from fxcompress.ir.program import Interface

_LEAST_BOUND, _BOUND = 8, 4
"""How far the sizes that may change can grow: so many, or so many times the example's, whichever is more."""


class _TensorInputs(nn.Module):
    """A model called with the tensors among its inputs; the others are the example's."""

    def __init__(self, model: nn.Module, interface: Interface, names: Names) -> None:
        super().__init__()
        self.model = model

        def forward(*tensors: torch.Tensor) -> Any:
            given = iter(tensors)
            leaves = [next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in interface.leaves]
            args, kwargs = interface.in_spec.unflatten(leaves)
            return model(*args, **kwargs)

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter(name, kind) for name in _parameter_names(names)]
        forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        self.forward = forward


def _parameter_names(names: Names) -> tuple[str, ...]:
    return tuple(f"input_{index}" for index in range(len(names.inputs)))  # those in a file may be words of Python


def _of_tensors(interface: Interface, names: Names) -> Interface:
    """How :class:`_TensorInputs` is called."""
    places = [place for place, leaf in enumerate(interface.leaves) if isinstance(leaf, torch.Tensor)]
    tensors = tuple(interface.leaves[place] for place in places)
    return replace(
        interface,
        args=tensors,
        kwargs={},
        in_spec=tree_structure((tensors, {})),
        names=_parameter_names(names),
        dynamic={new: interface.dynamic[old] for new, old in enumerate(places) if old in interface.dynamic},
        batch={new: interface.batch[old] for new, old in enumerate(places) if old in interface.batch},
        tied={},
    )


def write_executorch(module: fx.GraphModule, interface: Interface, path: Path, names: Names) -> None:
    """Writes a module that is in eval mode; what XNNPACK has no kernel for is computed by ExecuTorch's portable ones.

    ExecuTorch plans its memory ahead: sizes that may change can grow to four times the example's, at least to 8.
    """
    flat = _TensorInputs(module, interface, names)
    exported = reexport(TensorOutputs(flat).eval(), _of_tensors(interface, names))
    _bound(exported)
    _dequantize_for_each(exported.graph)
    join_circular_pads(exported.graph)
    try:
        with quiet("torch.utils._pytree", "executorch", "torchao"):
            path.write_bytes(_lowered(exported))
    except Exception as error:  # those of its many passes share no base class
        raise ArtifactError(_explain(error)) from error


def _lowered(exported: ExportedProgram) -> bytes:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    content: bytes = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch().buffer
    return content


def _bound(exported: ExportedProgram) -> None:
    """Bounds the sizes that may change, for what is planned by them."""
    for node in exported.graph.find_nodes(op="placeholder"):
        for size in getattr(node.meta.get("val"), "shape", ()):
            if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol):  # others follow from those
                symbol, known = size.node.expr, exported.range_constraints.get(size.node.expr)
                most = max(_LEAST_BOUND, _BOUND * int(size.node.hint))  # type: ignore[arg-type]
                if known is not None and not known.upper <= most:
                    bounded = ValueRanges(known.lower, most)
                    exported.range_constraints[symbol] = bounded
                    size.node.shape_env.var_to_range[symbol] = bounded  # type: ignore[union-attr]


def _dequantize_for_each(graph: fx.Graph) -> None:
    """Gives each reader a dequantized value of its own: XNNPACK's partitioner takes both into one kernel."""
    for node in list(graph.nodes):
        if is_call(node, "dequantize"):
            for user in list(node.users)[1:]:
                with graph.inserting_after(node):
                    user.replace_input_with(node, graph.node_copy(node))


def _explain(error: Exception) -> str:
    lacking = re.search(r"Missing out variants: \{(.*)\}", str(error))
    if lacking is None:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"ExecuTorch cannot lower it: {lines[0] if lines else type(error).__name__}; export to another format"
    names = ", ".join(sorted(re.findall(r"[\w.]+::[\w.]+", lacking[1]))).replace("::", ".")
    if QUANTIZED in names:
        return f"ExecuTorch has no kernel for {names}; quantize with insert-qdq{{target=executorch}}"
    return f"ExecuTorch has no kernel for {names}; write it with other operations, or export to another format"


@dataclass(frozen=True, eq=False)
class _Method:
    """Runs a program's method, which reads what it was loaded from as long as it runs."""

    content: bytes
    program: Any
    method: Any
    names: Names

    def __call__(self, tensors: Sequence[torch.Tensor]) -> list[Any]:
        for index, (name, tensor) in enumerate(zip(self.names.inputs, tensors, strict=True)):
            most = tuple(self.method.metadata.input_tensor_meta(index).sizes())
            if any(size > bound for size, bound in zip(tensor.shape, most, strict=True)):
                raise InputError(
                    f"input {name!r} is {tuple(tensor.shape)}, and the ExecuTorch file was planned for at most {most}; "
                    "trace the model with a larger example, or choose another engine"
                )
        given = [tensor.detach().contiguous() for tensor in tensors]
        return [result.clone() for result in self.method.execute(given)]  # the next call writes where these lie


def open_executorch(path: Path, names: Names) -> Run:
    """Runs a file on as many threads as ExecuTorch takes by default."""
    from executorch.runtime import Runtime

    content = path.read_bytes()
    program = Runtime.get().load_program(content)
    return _Method(content, program, program.load_method("forward"), names)
