"""OpenVINO IR: converted from an ONNX file, run by OpenVINO on the CPU."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fxcompress.engines.names import Names, Pieces, Run, forced, reads_of
from fxcompress.engines.onnx_blocks import block_sizes
from fxcompress.engines.onnx_format import write_onnx
from fxcompress.engines.onnx_integers import drop_zero_points
from fxcompress.engines.openvino_faults import write_around_faults
from fxcompress.errors import ArtifactError
from fxcompress.ir.program import Interface


def write_openvino(module: fx.GraphModule, interface: Interface, path: Path, names: Names) -> None:
    """Writes a module that is in eval mode."""
    import openvino
    from openvino.frontend import OpConversionFailure

    if odd := sorted(size for size in block_sizes(module) if size % 2):
        raise ArtifactError(
            f"OpenVINO computes something else where {odd[0]} inputs share a scale; quantize the weights with an even "
            "group-size, or export to ONNX"
        )
    with tempfile.TemporaryDirectory() as folder:
        onnx_file = Path(folder) / "model.onnx"
        write_onnx(module, interface, onnx_file, names)
        drop_zero_points(onnx_file)
        try:
            model = openvino.convert_model(onnx_file)
        except OpConversionFailure as error:
            reason = str(error).strip().splitlines()[-1].lstrip("- ")
            raise ArtifactError(
                f"OpenVINO cannot read it ({reason}); write that with other operations, or export to ONNX"
            ) from error
        write_around_faults(model)
        openvino.save_model(model, path, compress_to_fp16=False)


def open_openvino(path: Path, names: Names) -> Run:
    """Runs a file as OpenVINO does by default, but in float32 where nothing else is written."""
    import openvino

    compiled = _compiled(openvino.Core().read_model(path))

    def run(tensors: Sequence[torch.Tensor]) -> list[Any]:
        given = _run(compiled, dict(zip(names.inputs, tensors, strict=True)), names.outputs)
        return [given[name] for name in names.outputs]

    return run


def openvino_pieces(path: Path, names: Names, cuts: Collection[str]) -> Pieces:
    """A file in float32, cut at values.

    Outside its integer mode OpenVINO 2026.4 divides by the factor of a product that it fuses into a quantizer
    (``Multiply`` by one number a channel, then ``FakeQuantize``), so quantizers are kept apart from what they read;
    and it does not compile a convolution of one place with integer weights, whose input was given its places before.
    So weights are made real first.
    """
    import openvino
    from openvino import opset13 as ops
    from openvino.passes import ConstantFolding, Manager

    model = openvino.Core().read_model(path)
    folding = Manager()
    folding.register_pass(ConstantFolding())
    folding.run_passes(model)
    ports = [port for node in model.get_ops() for port in node.outputs()]
    found = {name: port for port in ports for name in sorted(port.get_names() & set(cuts))[:1]}
    given = {name: node for node in model.get_parameters() for name in node.output(0).get_names() & set(names.inputs)}
    ends = {name: [node] for node in model.get_results() for name in node.input_value(0).get_names()}
    for name, port in found.items():
        given[name] = ops.parameter(port.get_partial_shape(), openvino.Type.f32)
        given[name].output(0).set_names({forced(name)})
        for reader in port.get_target_inputs():
            if reader.get_node().get_type_name() != "Result":
                reader.replace_source_output(given[name].output(0))
        if name not in names.outputs:
            ends[name] = [ops.result(port)]
        ends[name].append(ops.result(port.get_node().input_value(0)))  # a second reader: nothing is fused into it
    read = _parameters_of(ends, given)

    @lru_cache(maxsize=1)  # mostly all is wanted at once, and again for the other batch
    def compiled(wanted: tuple[str, ...]) -> Any:
        results = {node.get_name(): node for name in wanted for node in ends[name]}
        needed = frozenset[str]().union(*(read[name] for name in wanted))
        piece = openvino.Model(list(results.values()), [given[name] for name in needed])
        return _compiled(piece, LP_TRANSFORMS_MODE="NO")

    def run(
        tensors: Sequence[torch.Tensor], values: Mapping[str, torch.Tensor], wanted: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        feed = dict(zip(names.inputs, tensors, strict=True)) | {forced(name): value for name, value in values.items()}
        return _run(compiled(tuple(wanted)), feed, wanted)

    return Pieces({name: read[name] & found.keys() for name in (*names.outputs, *found)}, run)


def _parameters_of(ends: Mapping[str, Sequence[Any]], given: Mapping[str, Any]) -> dict[str, frozenset[str]]:
    """Which parameters the results of each name are computed of."""
    import openvino

    whole = openvino.Model([result for results in ends.values() for result in results], list(given.values()))
    operations = ((map(_key, node.input_values()), map(_key, node.outputs())) for node in whole.get_ordered_ops())
    found = reads_of(operations, {_key(node.output(0)): name for name, node in given.items()})
    return {
        name: frozenset[str]().union(*(found[_key(result.input_value(0))] for result in results))
        for name, results in ends.items()
    }


def _key(port: Any) -> tuple[str, int]:
    return port.get_node().get_name(), port.get_index()


def _compiled(model: Any, **settings: str) -> Any:
    import openvino

    return openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", **settings})


def _run(compiled: Any, tensors: Mapping[str, torch.Tensor], wanted: Sequence[str]) -> dict[str, torch.Tensor]:
    """Runs a model on those of the tensors that it reads."""
    kept = {name for port in compiled.inputs for name in port.names}
    results = compiled({name: tensor.numpy(force=True) for name, tensor in tensors.items() if name in kept})
    return {name: torch.from_numpy(results[name].copy()) for name in wanted}
