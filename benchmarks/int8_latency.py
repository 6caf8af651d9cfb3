"""How fast int8 runs: ours, NNCF's in OpenVINO and onnxruntime's own, beside float32 in both engines and in eager.

For each network and batch one interleaved run in one process. Ratios are medians over rounds of the ratio within one
round: above 1 means that ours is faster. Beside the speed stands what each engine really computes in integers, read
from the graph that it executes, and the cosine of the outputs to those of float32. "ResNet-50 half" is ResNet-50 with
half of each channel group removed before: what pruning and int8 give together.

    python benchmarks/int8_latency.py
    python benchmarks/int8_latency.py --only DeiT-tiny --batch 1

Each network replaces its rows in the results, so that a run can be made in parts. Processors with VNNI have results of
their own (``int8_latency_vnni.json``).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))

import torch
from environment import RESULTS, of_processor, write_results
from int8_models import NETWORKS, Network, network, nncf_quantized, onnxruntime_quantized
from tabulate import tabulate
from torch.nn import functional
from torch.utils._pytree import tree_leaves

import fxcompress as fxc
from fxcompress.engines.executed import executed_layers, integer_share
from fxcompress.engines.export import tensor_names
from fxcompress.engines.formats import FORMATS, Run
from fxcompress.engines.latency import Latency, measure

ENGINES = {"openvino": (".xml", nncf_quantized), "onnxruntime": (".onnx", onnxruntime_quantized)}
COLUMNS = ("network", "batch", "engine", "eager ms", "float ms", "peer ms", "ours ms", "over eager", "over float",
           "over peer", "int8 layers", "peer int8", "cosine")  # fmt: skip
OPENINGS = 8
"""How often each file is opened anew: where a session's memory lies stays with it, and is worth some percent."""
MOST_ROUNDS = 15
"""Rounds at most for each opening."""


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--only", action="append", choices=list(NETWORKS), help="a network; all by default")
    arguments.add_argument("--batch", action="append", type=int, help="a batch size; 1 and 8 by default")
    arguments.add_argument("--seconds", type=float, default=30.0, help="time for each network and batch")
    chosen = arguments.parse_args()
    for name in chosen.only or NETWORKS:
        print(f"{name}: quantizing", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            rows = rows_of(name, Path(folder), chosen.batch or [1, 8], chosen.seconds)
        merge(name, rows)
        print(tabulate([[row.get(column) for column in COLUMNS] for row in rows], COLUMNS), flush=True)
    return 0


def rows_of(name: str, folder: Path, batches: list[int], seconds: float) -> list[dict[str, Any]]:
    subject = network(name)
    files = {engine: files_of(subject, engine, folder) for engine in ENGINES}
    return [row for batch in batches for row in measured(name, subject, files, batch, seconds)]


def files_of(subject: Network, engine: str, folder: Path) -> dict[str, Path]:
    """The network's file in float32, by the engine's own quantizer and by ours."""
    suffix, peer = ENGINES[engine]
    made = {version: folder / f"{engine}-{version}{suffix}" for version in ("float", "peer", "ours")}
    onnx_file = folder / "float.onnx"
    if not onnx_file.exists():
        fxc.export(subject.program, onnx_file)
    fxc.export(subject.program, made["float"])
    peer(subject, onnx_file, made["peer"])
    fxc.export(subject.quantized(engine), made["ours"])
    return made


def measured(
    name: str, subject: Network, files: dict[str, dict[str, Path]], batch: int, seconds: float
) -> list[dict[str, Any]]:
    inputs = {key: torch.cat([tensor] * batch)[:batch].contiguous() for key, tensor in subject.example.items()}
    with torch.no_grad():
        output = subject.model(**subject.example)
        expected = tree_leaves(subject.model(**inputs))[0]
    names = tensor_names(subject.program.interface, output)
    parts: list[dict[str, Latency]] = []
    for _ in range(OPENINGS):
        runs = opened(files, names)
        calls = {key: lambda run=run: run(list(inputs.values())) for key, run in runs.items()}
        calls["eager"] = lambda: subject.model(**inputs)
        parts.append(measure(calls, rounds=MOST_ROUNDS, budget=seconds / OPENINGS))
    latency = {key: pooled([part[key] for part in parts]) for key in parts[0]}
    rows = []
    for engine, versions in files.items():
        floating, peer, ours = (latency[f"{engine} {version}"] for version in ("float", "peer", "ours"))
        shares = {version: integer_share(executed_layers(file)) for version, file in versions.items()}
        cosine = functional.cosine_similarity(
            runs[f"{engine} ours"](list(inputs.values()))[0].flatten(1), expected.flatten(1)
        )
        rows.append({
            "network": name, "batch": batch, "engine": engine, "eager ms": ms(latency["eager"].median),
            "float ms": ms(floating.median), "peer ms": ms(peer.median), "ours ms": ms(ours.median),
            "over eager": round(ours.speedup_over(latency["eager"]), 2),
            "over float": round(ours.speedup_over(floating), 3), "over peer": round(ours.speedup_over(peer), 3),
            "int8 layers": round(shares["ours"], 3), "peer int8": round(shares["peer"], 3),
            "cosine": round(float(cosine.min()), 4), "spread": round(ours.spread, 3),
            "rounds": len(ours.samples),
        })  # fmt: skip
    return rows


def opened(files: dict[str, dict[str, Path]], names: tuple[list[str], list[str]]) -> dict[str, Run]:
    return {
        f"{engine} {version}": FORMATS[file.suffix].open(file, names)
        for engine, versions in files.items()
        for version, file in versions.items()
    }


def pooled(parts: list[Latency]) -> Latency:
    return Latency(tuple(sample for part in parts for sample in part.samples), parts[0].calls)


def ms(seconds: float) -> float:
    return float(f"{seconds * 1e3:.4g}")


def merge(name: str, rows: list[dict[str, Any]]) -> None:
    """Puts the rows of a network in the place of its old ones."""
    results = of_processor("int8_latency")
    path = RESULTS / f"{results}.json"
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    kept = [row for row in old if (row["network"], row["batch"]) not in {(name, row["batch"]) for row in rows}]
    order = list(NETWORKS)
    write_results(results, sorted([*kept, *rows], key=lambda row: (order.index(row["network"]), row["batch"])))


if __name__ == "__main__":
    sys.exit(main())
