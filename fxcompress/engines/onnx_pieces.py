"""ONNX files cut at what is rounded, to be checked piece by piece."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from fxcompress.engines.names import Names, Pieces, forced, reads_of
from fxcompress.engines.onnx_format import open_session, run_session
from fxcompress.engines.onnx_reading import needed_for, read_by


def onnx_pieces(path: Path, names: Names, cuts: Collection[str]) -> Pieces:
    """A file without graph optimizations, cut at values."""
    import onnx
    import onnxruntime

    model = onnx.load(path)
    found = {node.output[0] for node in model.graph.node if node.output[0] in cuts}
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = forced(name) if name in found else name
    for name in found:
        real = onnx.TensorProto.FLOAT
        model.graph.input.append(onnx.helper.make_tensor_value_info(forced(name), real, None))
        if name not in names.outputs:
            model.graph.output.append(onnx.helper.make_tensor_value_info(name, real, None))
    operations = ((read_by(node), node.output) for node in model.graph.node)
    reads = reads_of(operations, {forced(name): name for name in found})

    @lru_cache(maxsize=1)  # mostly all is wanted at once, and again for the other batch
    def opened(wanted: tuple[str, ...]) -> Any:
        piece = _that_gives(wanted, model).SerializeToString()
        return open_session(piece, path.name, onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL)

    def run(
        tensors: Sequence[torch.Tensor], values: Mapping[str, torch.Tensor], wanted: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        given = dict(zip(names.inputs, tensors, strict=True)) | {forced(name): value for name, value in values.items()}
        return run_session(opened(tuple(wanted)), given, wanted)

    return Pieces({name: reads.get(name, frozenset()) for name in (*names.outputs, *found)}, run)


def _that_gives(wanted: Collection[str], model: Any) -> Any:
    """The part of a model that computes some values."""
    import onnx

    graph, given = model.graph, frozenset(wanted)
    nodes, needed = needed_for(wanted, graph.node)
    inputs, held = ([value for value in values if value.name in needed] for values in (graph.input, graph.initializer))
    outputs = [value for value in graph.output if value.name in given]
    part = onnx.helper.make_graph(nodes, graph.name, inputs, outputs, held)
    return onnx.helper.make_model(
        part, opset_imports=model.opset_import, ir_version=model.ir_version, functions=model.functions
    )
