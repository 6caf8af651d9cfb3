"""ONNX files cut at what is rounded, to be checked piece by piece: as written, and as onnxruntime runs them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fxcompress.engines.names import Names, Pieces, forced, reads_of
from fxcompress.engines.onnx_format import open_session, run_session
from fxcompress.engines.onnx_reading import needed_for, read_by


@dataclass(frozen=True, eq=False)
class _Cut:
    """Where a file is cut: at a value in floating point, or at the integers that it is made of.

    Attributes:
        value: Name of what is cut.
        scale: What integers are multiplied by.
        zero_point: The integer that stands for 0; none where the value is in floating point.
    """

    value: str
    scale: np.ndarray[Any, Any] | None = None
    zero_point: np.ndarray[Any, Any] | None = None

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.float32) if self.zero_point is None else self.zero_point.dtype

    def held(self, value: torch.Tensor) -> torch.Tensor:
        """What the file holds for a value on the grid."""
        if self.scale is None or self.zero_point is None:
            return value
        limits = np.iinfo(self.zero_point.dtype)
        integers = np.rint(value.numpy(force=True) / self.scale) + self.zero_point
        return torch.from_numpy(integers.clip(limits.min, limits.max).astype(self.zero_point.dtype))

    def real(self, value: torch.Tensor) -> torch.Tensor:
        """The value that what the file holds stands for."""
        if self.scale is None or self.zero_point is None:
            return value
        return torch.from_numpy((value.numpy().astype(np.float32) - self.zero_point) * self.scale)


def onnx_pieces(path: Path, names: Names, cuts: Collection[str]) -> Pieces:
    """A file without graph optimizations, cut at values."""
    import onnx
    import onnxruntime

    model = onnx.load(path)
    found = {node.output[0]: _Cut(node.output[0]) for node in model.graph.node if node.output[0] in cuts}
    return _pieces(model, path.name, names, found, onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL)


def onnx_integer_pieces(path: Path, names: Names, cuts: Collection[str]) -> Pieces:
    """A file as onnxruntime computes it, cut at the integers that values are made of."""
    import onnx

    model = onnx.load(path)
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    found = {
        node.output[0]: _Cut(node.input[0], *(held[name] for name in node.input[1:3]))
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.output[0] in cuts
    }
    return _pieces(model, path.name, names, found, None)


def _pieces(model: Any, label: str, names: Names, cuts: Mapping[str, _Cut], level: Any) -> Pieces:
    """Makes what reads a value at a cut read an input in its place.

    Args:
        model: The file; it is changed.
        label: What to call it in messages.
        names: Names of the file.
        cuts: Name of a value -> where it is cut.
        level: How far onnxruntime optimizes the pieces; as it does by default if none.
    """
    import onnx

    values = {cut.value: cut for cut in cuts.values()}
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = forced(name) if name in values else name
    for value, cut in values.items():
        dtype = onnx.helper.np_dtype_to_tensor_dtype(cut.dtype)
        model.graph.input.append(onnx.helper.make_tensor_value_info(forced(value), dtype, None))
        if value not in names.outputs:
            model.graph.output.append(onnx.helper.make_tensor_value_info(value, dtype, None))
    operations = ((read_by(node), node.output) for node in model.graph.node)
    reads = reads_of(operations, {forced(cut.value): name for name, cut in cuts.items()})

    @lru_cache(maxsize=1)  # mostly all is wanted at once, and again for the other batch
    def opened(wanted: tuple[str, ...]) -> Any:
        return open_session(_that_gives(wanted, model).SerializeToString(), label, level)

    def run(
        tensors: Sequence[torch.Tensor], given: Mapping[str, torch.Tensor], wanted: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        feed = dict(zip(names.inputs, tensors, strict=True))
        feed |= {forced(cuts[name].value): cuts[name].held(value) for name, value in given.items() if name in cuts}
        places = {name: cuts.get(name, _Cut(name)) for name in wanted}
        fetched = tuple(dict.fromkeys(place.value for place in places.values()))
        found = run_session(opened(fetched), feed, fetched)
        return {name: place.real(found[place.value]) for name, place in places.items()}

    return Pieces(
        {name: reads.get(cuts.get(name, _Cut(name)).value, frozenset()) for name in (*names.outputs, *cuts)}, run
    )


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
