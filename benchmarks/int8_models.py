"""The networks whose int8 speed is measured, and int8 versions of each by ours and by the engines' own quantizers.

Weights are random but settled, as in the zoo: speed does not depend on them. Calibration batches are crops of
photographs, or random tokens.
"""

from __future__ import annotations

import functools
import inspect
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from photographs import CALIBRATION, crops
from torch import nn
from zoo import settle

import fxcompress as fxc

SIZE = 224
LENGTH = 128
VOCABULARY = 30522
CALIBRATION_SAMPLES = 32


@dataclass(frozen=True, eq=False)
class Network:
    """A network with float32 weights.

    Attributes:
        model: The network, in eval mode.
        example: Example inputs of two rows by the name of the argument.
        calibration: Batches of two rows.
        transformer: Whether it is one, for quantizers that want to be told.
        slimming: Passes that go before ours, as the start of a pipeline.
    """

    model: nn.Module
    example: dict[str, torch.Tensor]
    calibration: list[dict[str, torch.Tensor]]
    transformer: bool
    slimming: str = ""

    @functools.cached_property
    def program(self) -> fxc.Program:
        return fxc.PassManager("fold-batchnorm").run(fxc.trace(self.model, ((), self.example))).program

    @functools.cached_property
    def task(self) -> fxc.Task:
        return fxc.Task(calibration=self.calibration, inputs=lambda batch: ((), batch))

    def quantized(self, target: str) -> fxc.Program:
        """Our int8 version for a target."""
        return fxc.PassManager(f"{self.slimming}insert-qdq{{target={target}}}").run(self.program, self.task).program


def network(name: str) -> Network:
    """The network of that name in ``NETWORKS``."""
    torch.manual_seed(0)
    return NETWORKS[name]()


def _image(source: str, name: str, *, transformer: bool = False, slimming: str = "") -> Network:
    if source == "timm":
        import timm

        model = timm.create_model(name).eval()
    else:
        import torchvision

        model = torchvision.models.get_model(name, weights=None).eval()
    images = torch.cat([crops(photograph, 4, SIZE, 0) for photograph in CALIBRATION])[:CALIBRATION_SAMPLES]
    settle(model, (images[:4],), {})
    argument = next(iter(inspect.signature(model.forward).parameters))
    batches = [{argument: batch} for batch in images.split(2)]
    return Network(model, batches[0], batches, transformer, slimming)


def _bert() -> Network:
    """BERT-small: 4 layers of width 512 (Turc et al. 2019, arXiv:1908.08962)."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(hidden_size=512, num_hidden_layers=4, num_attention_heads=8, intermediate_size=2048)
    model = BertForSequenceClassification(config).eval()
    batches = []
    for _ in range(CALIBRATION_SAMPLES // 2):
        ids = torch.randint(3, VOCABULARY, (2, LENGTH))
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    settle(model, (), batches[0])
    return Network(model, batches[0], batches, transformer=True)


NETWORKS: dict[str, Callable[[], Network]] = {
    "ResNet-18": functools.partial(_image, "torchvision", "resnet18"),
    "ResNet-50": functools.partial(_image, "torchvision", "resnet50"),
    "ResNet-50 half": functools.partial(
        _image, "torchvision", "resnet50", slimming="select-channels{criterion=l2 round-to=16},remove-channels,"
    ),
    "MobileNetV2": functools.partial(_image, "torchvision", "mobilenet_v2"),
    "EfficientNet-Lite0": functools.partial(_image, "timm", "tf_efficientnet_lite0"),
    "DeiT-tiny": functools.partial(_image, "timm", "deit_tiny_patch16_224", transformer=True),
    "ConvNeXt-tiny": functools.partial(_image, "torchvision", "convnext_tiny"),
    "BERT-small": _bert,
}  # fmt: skip


def nncf_quantized(network: Network, onnx_file: Path, file: Path) -> None:
    """Writes NNCF's int8 version of an ONNX file as OpenVINO IR."""
    import nncf
    import openvino

    model = openvino.convert_model(onnx_file)
    dataset = nncf.Dataset(network.calibration, lambda batch: {k: v.numpy() for k, v in batch.items()})
    kind = nncf.ModelType.TRANSFORMER if network.transformer else None
    made = nncf.quantize(model, dataset, model_type=kind, subset_size=len(network.calibration))
    openvino.save_model(made, file, compress_to_fp16=False)


def onnxruntime_quantized(network: Network, onnx_file: Path, file: Path) -> None:
    """Writes onnxruntime's own static int8 version (QDQ, weights per channel) of an ONNX file."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches: Iterator[dict[str, np.ndarray[Any, Any]]] = iter(
                {name: tensor.numpy() for name, tensor in batch.items()} for batch in network.calibration
            )

        def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
            return next(self.batches, None)

    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(onnx_file, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared, file, Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
