"""OpenVINO IR: converted from an ONNX file, run by OpenVINO on the CPU."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fxcompress.engines.names import Names, Run, RunPieces, pieces_of
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

    return _run_model(openvino.Core().read_model(path), names, {})


def openvino_pieces(path: Path, names: Names, cuts: Collection[str]) -> RunPieces:
    """Runs a file in float32, cut at values: what reads one reads an input in its place.

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
    forced = {name: f"{name}_forced" for name in found}
    for name, port in found.items():
        given = ops.parameter(port.get_partial_shape(), openvino.Type.f32, name=forced[name])
        given.output(0).set_names({forced[name]})
        for reader in port.get_target_inputs():
            if reader.get_node().get_type_name() != "Result":
                reader.replace_source_output(given.output(0))
        model.add_parameters([given])
        if name not in names.outputs:
            model.add_results([ops.result(port)])
        model.add_results([ops.result(port.get_node().input_value(0))])  # a second reader: nothing is fused into it
    run = _run_model(model, names.with_cuts(forced), {"LP_TRANSFORMS_MODE": "NO"})
    return pieces_of(run, names, list(found))


def _run_model(model: Any, names: Names, settings: Mapping[str, str]) -> Run:
    import openvino

    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", **settings})
    kept = {name for port in compiled.inputs for name in port.names}

    def run(tensors: Sequence[torch.Tensor]) -> list[Any]:
        feed = {
            name: tensor.numpy(force=True) for name, tensor in zip(names.inputs, tensors, strict=True) if name in kept
        }
        results = compiled(feed)
        return [torch.from_numpy(results[name].copy()) for name in names.outputs]

    return run
