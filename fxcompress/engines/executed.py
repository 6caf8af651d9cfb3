"""Executed graphs: what an engine made of a file, and which of its layers it really computes in integers.

A file may say one thing and the engine do another: Q/DQ nodes that it does not recognise are computed as they stand,
around a kernel in floating point. The graph that the engine runs, after its own optimizations, tells.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxcompress.engines import executorch_layers
from fxcompress.errors import ArtifactError, InputError


@dataclass(frozen=True)
class ExecutedLayer:
    """A convolution, linear layer or matrix product as an engine runs it.

    Attributes:
        name: The engine's name for it.
        operator: The engine's operator.
        integer: Whether it multiplies integers.
    """

    name: str
    operator: str
    integer: bool


_ONNX_INTEGER = frozenset(
    {"QLinearConv", "ConvInteger", "QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat",
     "DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "QAttention"}
)  # fmt: skip
_ONNX_FLOATING = frozenset(
    {"Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "Attention",
     "MultiHeadAttention", "GroupQueryAttention", "MatMulNBits", "LSTM", "GRU", "RNN"}
)  # fmt: skip
_OPENVINO = frozenset({"Convolution", "Deconvolution", "FullyConnected", "MatMul", "MHA", "ScaledDotProductAttention"})
_INTEGER_PRECISIONS = frozenset({"i8", "u8"})


def executed_layers(file: Path) -> tuple[ExecutedLayer, ...]:
    """The layers that an engine runs for a file, in order; those of files that ``fxcompress.export`` writes.

    Args:
        file: An ONNX file (run by onnxruntime), an OpenVINO IR (run by OpenVINO) or an ExecuTorch program, on the CPU.

    Raises:
        InputError: Another kind of file.
        ArtifactError: The engine cannot take the file.
    """
    if file.suffix not in _READERS:
        raise InputError(f"{file} has no executed graph to read; give a file that ends in {' or '.join(_READERS)}")
    return tuple(_READERS[file.suffix](file))


def integer_share(layers: Sequence[ExecutedLayer]) -> float:
    """The share of layers that are computed in integers; 1 where there is none."""
    return sum(layer.integer for layer in layers) / len(layers) if layers else 1.0


def _of_onnxruntime(file: Path) -> list[ExecutedLayer]:
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory(prefix="fxcompress-") as folder:
        optimized = Path(folder) / "optimized.onnx"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(optimized)
        try:
            onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise ArtifactError(f"onnxruntime cannot run {file}: {error}") from error
        nodes = onnx.load(optimized, load_external_data=False).graph.node
    return [
        ExecutedLayer(node.name, node.op_type, node.op_type in _ONNX_INTEGER)
        for node in nodes
        if node.op_type in _ONNX_INTEGER | _ONNX_FLOATING
    ]


def _of_openvino(file: Path) -> list[ExecutedLayer]:
    import openvino

    core = openvino.Core()
    model = core.read_model(file)
    written = {made.get_friendly_name(): made.get_type_name() for made in model.get_ops()}
    try:
        compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    except RuntimeError as error:
        raise ArtifactError(f"OpenVINO cannot run {file}: {error}") from error
    executed = compiled.get_runtime_model().get_ordered_ops()
    return [layer for operation in executed if (layer := _openvino_layer(operation, written)) is not None]


def _openvino_layer(operation: Any, written: Mapping[str, str]) -> ExecutedLayer | None:
    """The layer that an executed operation is, if it is one.

    Where there is AVX-512, attention is compiled into one kernel, for which the runtime gives one precision: whether
    its queries, keys and values come as integers tells more.

    Args:
        operation: What is executed.
        written: Name -> operator of what the file holds.
    """
    said: Mapping[str, Any] = operation.get_rt_info()
    kind, precision, origins = (
        str(said[key].value) if key in said else "" for key in ("layerType", "runtimePrecision", "originalLayersNames")
    )
    integer = precision in _INTEGER_PRECISIONS
    if kind == "Subgraph" and any(written.get(name) in _OPENVINO for name in origins.split(",")):
        read = [value.get_element_type().get_type_name() for value in operation.inputs()]
        kind, integer = "MHA", sum(name in _INTEGER_PRECISIONS for name in read) >= 3
    return ExecutedLayer(operation.get_friendly_name(), kind, integer) if kind in _OPENVINO else None


def _of_executorch(file: Path) -> list[ExecutedLayer]:
    return [ExecutedLayer(*found) for found in executorch_layers.layers(file)]


_READERS: Mapping[str, Callable[[Path], list[ExecutedLayer]]] = {
    ".onnx": _of_onnxruntime, ".xml": _of_openvino, ".pte": _of_executorch,
}  # fmt: skip
