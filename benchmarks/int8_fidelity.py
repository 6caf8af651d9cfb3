"""How near int8 models stay to their own float32 outputs, beside onnxruntime's quantizer, NNCF and torchao PT2E.

Every tool gets the same float model and the same 128 calibration crops, makes weights of 8 bits per output channel and
activations of 8 bits, and is asked on 256 crops of photographs that no one calibrated on: the signal to noise ratio of
the outputs (SQNR) and how often the same class comes first (top-1 agreement). Ours are run as simulated in PyTorch and
in the engine that they were made for, from the exported file; peers in their own engine.

EfficientNet-Lite0 has its ImageNet weights. No package ships weights of MobileNets, so those are trained here, for a
few epochs on scikit-learn's digits, and calibrated and tested on digits that they were not trained on.

    python benchmarks/int8_fidelity.py
    python benchmarks/int8_fidelity.py --models efficientnet_lite0 --only 'ours *'
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import math
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from environment import of_processor, write_results
from photographs import CALIBRATION, TEST, crops, efficientnet_lite0
from tabulate import tabulate
from torch import nn
from torch.nn import functional

import fxcompress as fxc

Run = Callable[[torch.Tensor], torch.Tensor]

BATCH = 16
CALIBRATION_SIZE, TEST_SIZE = 128, 256
OBSERVERS = ("minmax", "moving-average", "percentile", "mse", "entropy")
TARGETS = ("onnxruntime", "openvino", "x86")
"""The last is what torchao's quantizer places for."""
ENGINES = ("onnxruntime", "openvino")
CORRECTIONS = ("equalize", "correct-bias", "refine-rounding")
"""In the order of the recipe."""
BESIDE_PEERS = ("calibration", "all")


@dataclass(frozen=True, eq=False)
class Subject:
    """A network, and what may be known about it.

    Attributes:
        name: What it is, with where its weights come from.
        model: The network in float32.
        calibration: Images to calibrate on, in batches.
        test: Images to compare on.
    """

    name: str
    model: nn.Module
    calibration: list[torch.Tensor]
    test: torch.Tensor
    _programs: dict[tuple[str, ...], fxc.Program] = field(default_factory=dict)

    @cached_property
    def expected(self) -> torch.Tensor:
        return outputs(self.model, self.test)

    @cached_property
    def task(self) -> fxc.Task:
        return fxc.Task(calibration=self.calibration)

    def program(self, passes: tuple[str, ...]) -> fxc.Program:
        """The Program after some passes; what pipelines have in common runs once."""
        if passes not in self._programs:
            if passes:
                before = self.program(passes[:-1])
                self._programs[passes] = fxc.PassManager(passes[-1], instruments=[]).run(before, self.task).program
            else:
                self._programs[passes] = fxc.trace(self.model, self.calibration[0][:2].clone())
        return self._programs[passes]


def outputs(run: Run, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([run(batch) for batch in images.split(BATCH)])


# --- networks --------------------------------------------------------------------------------------------------------


def photographs(name: str, model: nn.Module, size: int) -> Subject:
    """A network for photographs; calibration batches mix them."""
    count, tests = math.ceil(CALIBRATION_SIZE / len(CALIBRATION)), TEST_SIZE // len(TEST)
    each = [crops(photograph, count, size, seed) for seed, photograph in enumerate(CALIBRATION)]
    mixed = torch.stack(each, 1).flatten(0, 1)[:CALIBRATION_SIZE]
    test = torch.cat([crops(photograph, tests, size, 1000 + seed) for seed, photograph in enumerate(TEST)])
    return Subject(name, model, list(mixed.split(BATCH)), test)


def lite0() -> Subject:
    return photographs("EfficientNet-Lite0, ImageNet", efficientnet_lite0(), 224)


def trained(name: str) -> Subject:
    """A network of timm's trained on digits, enlarged to 64 x 64 pixels, for some minutes.

    After four epochs some test images made outputs that were 50 times as large as others, and their error was all that
    the SQNR told of.
    """
    import timm
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8).expand(-1, 3, 8, 8) / 8 - 1
    images = functional.interpolate(images, size=(64, 64), mode="bilinear")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], torch.from_numpy(labels)[order]
    held = CALIBRATION_SIZE + TEST_SIZE
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    _train(model, images[held:], labels[held:])
    calibration, test = images[:held].split([CALIBRATION_SIZE, TEST_SIZE])
    return Subject(f"{name}, digits", model.eval(), list(calibration.split(BATCH)), test)


def _train(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, epochs: int = 8) -> None:
    steps = epochs * math.ceil(len(images) / 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(model(images[chosen]), labels[chosen], label_smoothing=0.1).backward()
            optimizer.step()
            schedule.step()


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "efficientnet_lite0": lite0,
    "mobilenetv2": lambda: trained("mobilenetv2_100"),
    "mobilenetv3": lambda: trained("mobilenetv3_small_100"),
}


# --- ours ------------------------------------------------------------------------------------------------------------


def our_pipelines() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Name and passes, with ``TARGET`` in place of the engine."""
    for observer in OBSERVERS:
        yield f"calibration, {observer}", ("fold-batchnorm", f"insert-qdq{{target=TARGET observer={observer}}}")
    yield "calibration, vnni", ("fold-batchnorm", "insert-qdq{target=TARGET vnni=true}")
    yield "calibration", ("fold-batchnorm", "insert-qdq{target=TARGET}")
    for correction in CORRECTIONS:
        yield correction, with_corrections([correction])
    yield "all", with_corrections(CORRECTIONS)
    for correction in CORRECTIONS:
        yield f"all but {correction}", with_corrections([each for each in CORRECTIONS if each != correction])


def with_corrections(chosen: list[str] | tuple[str, ...]) -> tuple[str, ...]:
    """A pipeline; equalization goes before the Q/DQ nodes, the other corrections after them."""
    before = [each for each in chosen if each == "equalize"]
    after = [each for each in chosen if each != "equalize"]
    return "fold-batchnorm", *before, "insert-qdq{target=TARGET}", *after


def ours(subject: Subject, name: str, passes: tuple[str, ...]) -> Iterator[tuple[str, Run]]:
    """As simulated; the rows that stand beside peers for each target, and in both engines too."""
    for target in TARGETS if name in BESIDE_PEERS else TARGETS[:1]:
        program = subject.program(tuple(each.replace("TARGET", target) for each in passes))
        yield f"simulated for {target}", program
        if name in BESIDE_PEERS and target in ENGINES:
            yield target, fxc.compile(program, target)


# --- peers -----------------------------------------------------------------------------------------------------------


def onnxruntime_quantizer(subject: Subject, reduce_range: bool) -> Iterator[tuple[str, Run]]:
    """Static QDQ after the quantizer's own preprocessing, as its documentation recommends.

    It also recommends ``reduce_range`` for processors without VNNI, whose sums of products saturate.
    """
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._left = iter(subject.calibration)

        def get_next(self) -> dict[str, Any] | None:
            return next(({"x": batch.numpy()} for batch in self._left), None)

    with tempfile.TemporaryDirectory() as folder:
        path, prepared, done = (str(Path(folder) / name) for name in ("float.onnx", "prepared.onnx", "int8.onnx"))
        fxc.export(subject.program(()), path)
        quant_pre_process(path, prepared)
        quantize_static(
            prepared, done, Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            reduce_range=reduce_range,
        )  # fmt: skip
        session = onnxruntime.InferenceSession(Path(done).read_bytes(), providers=["CPUExecutionProvider"])
    yield "onnxruntime", lambda images: torch.from_numpy(session.run(None, {"x": images.numpy()})[0])


def nncf_quantizer(subject: Subject, everywhere: bool) -> Iterator[tuple[str, Run]]:
    """Post-training quantization with NNCF's defaults, on all calibration images.

    By default only the first layer's weights have half the range, so that no sum of products saturates on processors
    without VNNI; ``everywhere`` does so in all layers, as NNCF offers for those.
    """
    import nncf
    import openvino
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "float.onnx"
        fxc.export(subject.program(()), path)
        model = openvino.convert_model(path)
    images = torch.cat(subject.calibration).numpy()[:, None]
    fix = OverflowFix.ENABLE if everywhere else OverflowFix.FIRST_LAYER
    found = nncf.quantize(
        model, nncf.Dataset(list(images)), subset_size=len(images),
        advanced_parameters=AdvancedQuantizationParameters(overflow_fix=fix),
    )  # fmt: skip
    compiled = openvino.Core().compile_model(found, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    yield "openvino", lambda batch: torch.from_numpy(compiled(batch.numpy())[0].copy())


def torchao_pt2e(subject: Subject) -> Iterator[tuple[str, Run]]:
    """PT2E with the x86 quantizer's default configuration."""
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    batch = torch.export.Dim("batch")
    exported = torch.export.export(subject.model, (subject.calibration[0],), dynamic_shapes=({0: batch},)).module()
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(exported, quantizer)
    with torch.no_grad():
        for images in subject.calibration:
            prepared(images)
    yield "simulated", convert_pt2e(prepared)


PEERS: dict[str, tuple[str, Callable[[Subject], Iterator[tuple[str, Run]]]]] = {
    "onnxruntime static QDQ": ("onnxruntime", lambda subject: onnxruntime_quantizer(subject, reduce_range=False)),
    "onnxruntime, reduced range": ("onnxruntime", lambda subject: onnxruntime_quantizer(subject, reduce_range=True)),
    "NNCF + OpenVINO": ("nncf", lambda subject: nncf_quantizer(subject, everywhere=False)),
    "NNCF, overflow fix": ("nncf", lambda subject: nncf_quantizer(subject, everywhere=True)),
    "torchao PT2E x86": ("torchao", torchao_pt2e),
}
"""Row -> the package that it needs, and the work."""


# --- measuring -------------------------------------------------------------------------------------------------------


def runs() -> Iterator[tuple[str, Callable[[Subject], Iterator[tuple[str, Run]]]]]:
    for name, (package, work) in PEERS.items():
        if importlib.util.find_spec(package):
            yield name, work
    for name, passes in our_pipelines():
        yield f"ours {name}", lambda subject, name=name, passes=passes: ours(subject, name, passes)


def measure(subject: Subject, only: str) -> Iterator[dict[str, Any]]:
    for name, work in runs():
        if fnmatch.fnmatch(name, only):
            try:
                yield from _rows(subject, name, work)
            except Exception as error:  # peers fail in ways of their own, and a row that fails is a result
                reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
                print(f"{subject.name} | {name} | {reason}", flush=True)
                yield {"model": subject.name, "row": name, "where": "-", "error": reason}


def _rows(
    subject: Subject, name: str, work: Callable[[Subject], Iterator[tuple[str, Run]]]
) -> Iterator[dict[str, Any]]:
    made = work(subject)
    while True:
        started = time.process_time()
        found = next(made, None)
        if found is None:
            return
        seconds = time.process_time() - started
        where, run = found
        row = {
            "model": subject.name,
            "row": name,
            "where": where,
            **fidelity(outputs(run, subject.test), subject.expected),
        }
        print(" | ".join(map(str, row.values())), f"| {seconds:.0f} s", flush=True)
        yield row | {"seconds": round(seconds, 1)}


def fidelity(found: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    """SQNR in dB and top-1 agreement."""
    noise = (found.double() - expected.double()).square().sum()
    sqnr = 10 * math.log10(float(expected.double().square().sum() / noise)) if noise > 0 else math.inf
    agreement = float((found.argmax(1) == expected.argmax(1)).double().mean())
    return {"sqnr_db": round(sqnr, 2), "agreement": round(agreement, 3)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--only", default="*", help="rows that match this pattern; nothing is written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = [row for name in options.models for row in measure(SUBJECTS[name](), options.only)]
    columns = ("model", "row", "where", "sqnr_db", "agreement", "seconds")
    print(tabulate([[row.get(column) for column in columns] for row in rows], columns, floatfmt=".3f"))
    if options.only == "*" and options.models == list(SUBJECTS):
        print(f"written to {write_results(of_processor('int8_fidelity'), rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
