"""The graph that ExecuTorch runs for a file: what XNNPACK was handed, and what is left to portable kernels."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

_LAYERS = frozenset(
    {"XNNConv2d", "XNNDepthwiseConv2d", "XNNConvTranspose2d", "XNNFullyConnected", "XNNBatchMatrixMultiply",
     "XNNScaledDotProductAttention"}
)  # fmt: skip
_PORTABLE = frozenset({"aten::convolution", "aten::linear", "aten::addmm", "aten::mm", "aten::bmm"})
_INTEGER = ("xnn_datatype_q", "xnn_datatype_int")


def layers(file: Path) -> Iterator[tuple[str, str, bool]]:
    """Name, operator and whether it multiplies integers, of each layer of a ``.pte`` file."""
    from executorch.exir._serialize._program import deserialize_pte_binary

    program = deserialize_pte_binary(file.read_bytes()).program
    plan = program.execution_plan[0]
    for index, delegate in enumerate(plan.delegates):
        graph = _xnnpack_graph(program.backend_delegate_data[delegate.processed.index].data)
        dtypes = dict(map(_value, graph["xvalues"]))
        for place, node in enumerate(graph["xnodes"]):
            operator, call = node["xnode_union_type"], node["xnode_union"]
            if operator in _LAYERS:
                first = call["input1_id"] if "input1_id" in call else call["query_id"]
                yield f"delegate {index}, node {place}", operator, dtypes[first].startswith(_INTEGER)
    for place, instruction in enumerate(plan.chains[0].instructions):
        kernel = getattr(instruction.instr_args, "op_index", None)
        if kernel is not None and plan.operators[kernel].name in _PORTABLE:
            yield f"instruction {place}", plan.operators[kernel].name, False


def _value(value: Mapping[str, Any]) -> tuple[int, str]:
    """Number and dtype of a value."""
    held = value["xvalue_union"]
    tensor = held.get("tensor_value", held)
    return tensor["id_out"], tensor["datatype"]


def _xnnpack_graph(content: bytes) -> Mapping[str, Any]:
    """The graph in what was handed to XNNPACK, as its schema reads it."""
    from executorch.backends.xnnpack import serialization
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    header = XNNHeader.from_bytes(content[: XNNHeader.EXPECTED_LENGTH])
    with tempfile.TemporaryDirectory(prefix="fxcompress-") as folder:
        schema, binary = Path(folder) / "schema.fbs", Path(folder) / "graph.bin"
        schema.write_bytes(resources.files(serialization).joinpath("schema.fbs").read_bytes())
        binary.write_bytes(content[header.flatbuffer_offset :][: header.flatbuffer_size])
        _flatc_decompile(folder, str(schema), str(binary), ["--raw-binary"])
        text = (Path(folder) / "graph.json").read_text()
    text = re.sub(r": (-?)inf\b", r": \1Infinity", text)  # as Python writes it
    found: Mapping[str, Any] = json.loads(re.sub(r": -?nan\b", ": NaN", text))
    return found
