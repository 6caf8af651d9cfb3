"""ONNX files: written by torch.onnx from a torch.export graph, run by onnxruntime."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from fxcompress.engines.names import Names, Run
from fxcompress.engines.onnx_blocks import BLOCKS_OPSET, block_translations, pack_blocks
from fxcompress.engines.onnx_dynamic import forget_types, grid_translations
from fxcompress.engines.onnx_experts import expert_translations
from fxcompress.engines.onnx_optimizer import simplify
from fxcompress.engines.onnx_settled import settle
from fxcompress.engines.quiet import quiet
from fxcompress.engines.reexport import TensorOutputs, reexport
from fxcompress.errors import ArtifactError
from fxcompress.ir.program import Interface


def write_onnx(module: nn.Module, interface: Interface, path: Path, names: Names) -> None:
    """Writes a module that is in eval mode."""
    import onnx

    exported = reexport(TensorOutputs(module).eval(), interface)
    settle(exported)
    blocks = block_translations(exported)
    with quiet("torch.onnx", "onnxscript", "onnx_ir"):
        try:
            program = torch.onnx.export(
                exported,
                dynamo=True,
                external_data=False,
                verbose=False,
                optimize=False,
                input_names=names.inputs,
                output_names=names.outputs,
                opset_version=BLOCKS_OPSET if blocks else None,
                custom_translation_table=blocks | grid_translations(exported) | expert_translations(exported),
            )
            assert program is not None
            simplify(program.model)
        except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
            raise ArtifactError(_explain(error, exported)) from error
    model = program.model_proto
    _name_dims(model, names)
    pack_blocks(model)
    forget_types(model)
    onnx.save(model, path)


def _explain(error: BaseException, exported: ExportedProgram) -> str:
    causes: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        causes.append(str(cause).strip() or type(cause).__name__)
        cause = cause.__cause__
    found = re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)', overload='(\w+)'\)", "\n".join(causes))
    if found is None:
        return f"ONNX export fails: {causes[-1].splitlines()[0]}; export to .pt2 instead"
    operator = f"{found[1]}.{found[2]}"
    numbers = " on complex numbers" if operator in _complex_operators(exported) else ""
    return (
        f"ONNX export has no translation for the operator {operator}{numbers}; write it with other operations, or "
        "export to .pt2 instead"
    )


def _complex_operators(exported: ExportedProgram) -> set[str]:
    made = ((node, node.meta.get("val")) for node in exported.graph.nodes)
    return {str(node.target) for node, value in made if isinstance(value, torch.Tensor) and value.is_complex()}


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


def open_onnx(path: Path, names: Names) -> Run:
    """Runs a file as onnxruntime does by default."""
    session = open_session(path.read_bytes(), path.name)

    def run(tensors: Sequence[torch.Tensor]) -> list[Any]:
        return list(run_session(session, dict(zip(names.inputs, tensors, strict=True)), names.outputs).values())

    return run


def open_session(content: bytes, label: str, level: Any = None) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if level is not None:
        options.graph_optimization_level = level
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise ArtifactError(
            f"onnxruntime cannot run {label}: {error}; use a dtype or operator that it knows, or export to .pt2"
        ) from error


def run_session(session: Any, tensors: Mapping[str, torch.Tensor], wanted: Sequence[str]) -> dict[str, torch.Tensor]:
    """Runs a session on those of the tensors that it reads."""
    feed = {value.name: tensors[value.name].numpy(force=True) for value in session.get_inputs()}
    return dict(zip(wanted, map(torch.from_numpy, session.run(list(wanted), feed)), strict=True))
