"""What channel removal costs: beside Torch-Pruning, as models grow, and for an 8B-parameter Llama without weights.

Ours is analysis, selection and removal at ratio 0.5 on a traced Program; tracing is a column of its own, and so is the
same pipeline with the checks that run by default (verifier, numerics, oracle), which is run once. Theirs is the
dependency graph, which traces the model too, and one step of the magnitude pruner at the same ratio. Each subject has a
process of its own, in which both run on one thread in interleaved rounds; times are medians of processor seconds, so
that what else runs on the machine does not count.

    python benchmarks/removal_speed.py
    python benchmarks/removal_speed.py --only 'resnet*' --rounds 5
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import fnmatch
import functools
import gc
import importlib.util
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from environment import write_results
from tabulate import tabulate
from torch import nn
from trace_time import llama

import fxcompress as fxc

MODELS = (
    "resnet18", "resnet50", "resnet152", "densenet121", "densenet201", "vit_b_16", "convnext_large", "swin_t",
)  # fmt: skip
LLAMA_DEPTHS = (2, 4, 8, 16, 32, 64)
PIPELINE = "select-channels{ratio=0.5},remove-channels"
LIMIT_S = 90
"""After so many processor seconds Torch-Pruning is stopped."""

LONG_S = 20
"""What takes longer is run once."""

COLUMNS = {
    "model": ("subject", "nodes", "capture_s", "ours_s", "ms_per_node", "verified_s", "theirs_s", "ratio", "ours_left",
              "theirs_left", "note"),
    "llama": ("subject", "nodes", "capture_s", "ours_s", "ms_per_node"),
    "shape": ("subject", "nodes", "capture_s", "analysis_s", "plan_s", "peak_gb", "before_gb"),
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="*", help="subjects whose name matches this pattern; nothing is written")
    parser.add_argument("--subject", choices=SUBJECTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.subject:
        print(json.dumps(measured(options.subject, options.rounds)))
        return 0
    chosen = [subject for subject in SUBJECTS if fnmatch.fnmatch(subject, options.only)]
    rows = [in_own_process(subject, options.rounds) for subject in chosen]
    for kind, columns in COLUMNS.items():
        table = [[row[column] for column in columns] for row in rows if row["kind"] == kind]
        print(tabulate(table, columns, floatfmt=".3f"), end="\n\n")
    print("\n".join(summary(rows)))
    if options.only == "*":
        print(f"written to {write_results('removal_speed', rows)}")
    return 0


def in_own_process(subject: str, rounds: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--subject", subject, "--rounds", str(rounds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{subject}: done", file=sys.stderr)
    return row


def measured(subject: str, rounds: int) -> dict[str, Any]:
    """The row of a subject."""
    torch.set_num_threads(1)
    return {"subject": subject, **SUBJECTS[subject](rounds)}


def warm_up() -> None:
    """The first run of a process pays for imports and for caches of PyTorch."""
    ours(fxc.trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1)), torch.randn(2, 3, 8, 8)))()


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds of one call, and its value."""
    gc.collect()
    started = time.process_time()
    value = work()
    return time.process_time() - started, value


def ours(program: fxc.Program, instruments: Sequence[Any] | None = ()) -> Callable[[], fxc.Program]:
    """Our work on a Program of which nothing has been analysed; ``instruments`` of ``None`` are the default ones."""
    fresh = program.copy()
    fresh._analyses = {}
    return lambda: fxc.PassManager(PIPELINE, instruments).run(fresh).program


def theirs(model: nn.Module, example: torch.Tensor) -> Callable[[], nn.Module]:
    """Torch-Pruning's work on a copy of the model."""
    import torch_pruning

    slim = copy.deepcopy(model)
    head = [layer for layer in slim.modules() if isinstance(layer, nn.Linear)][-1]

    def work() -> nn.Module:
        criterion = torch_pruning.importance.MagnitudeImportance(p=2)
        pruner = torch_pruning.pruner.MagnitudePruner(
            slim, example, importance=criterion, pruning_ratio=0.5, ignored_layers=[head]
        )
        pruner.step()
        return slim

    return work


def beside_torch_pruning(name: str, rounds: int) -> dict[str, Any]:
    """One torchvision model, with random weights."""
    import torchvision

    warm_up()
    model = getattr(torchvision.models, name)(weights=None).eval()
    example = torch.randn(2, 3, 224, 224)
    capture_s, program = seconds(lambda: fxc.trace(model, example))
    own: list[float] = []
    peer: list[float] = []
    theirs_left, note = None, "" if importlib.util.find_spec("torch_pruning") else "Torch-Pruning is not installed"
    for _ in range(rounds):
        duration, slim = seconds(ours(program))
        own.append(duration)
        if not note and sum(peer) < LONG_S:
            try:
                duration, pruned = limited(theirs(model, example[:1]))
                peer.append(duration)
                theirs_left = share(pruned, model)
                pruned(example)
            except Exception as error:  # whatever it fails with is the note
                happened = "its result does not run" if peer else "it fails"
                note = f"{happened}: {type(error).__name__}: {str(error).strip().splitlines()[0][:60]}"
    ours_left = share(slim.graph_module, model)
    verified_s, _ = seconds(ours(program, None))
    theirs_s = statistics.median(peer) if peer else None
    stopped = "TimeoutError" in note
    return {
        "kind": "model", **timed(program, capture_s, own), "verified_s": round(verified_s, 2),
        "theirs_s": theirs_s and round(theirs_s, 3), "ratio": theirs_s and round(theirs_s / statistics.median(own), 2),
        "ratio_above": round(LIMIT_S / statistics.median(own), 2) if stopped else None,
        "ours_left": ours_left, "theirs_left": theirs_left, "note": note,
    }  # fmt: skip


def timed(program: fxc.Program, capture_s: float, own: list[float]) -> dict[str, Any]:
    ours_s, nodes = statistics.median(own), len(program.graph.nodes)
    return {
        "nodes": nodes, "capture_s": round(capture_s, 3), "ours_s": round(ours_s, 4),
        "ms_per_node": round(1000 * ours_s / nodes, 4), "rounds": len(own),
    }  # fmt: skip


def limited(work: Callable[[], nn.Module]) -> tuple[float, nn.Module]:
    """Seconds of Torch-Pruning, which is stopped when it takes too long."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done in {LIMIT_S} s")

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(None):
            warnings.simplefilter("ignore")
            return seconds(work)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def share(slim: nn.Module, model: nn.Module) -> float:
    """Parameters left."""
    counts = [sum(parameter.numel() for parameter in module.parameters()) for module in (slim, model)]
    return round(counts[0] / counts[1], 3)


def of_depth(depth: int, rounds: int) -> dict[str, Any]:
    """A small Llama of some layers."""
    warm_up()
    model, inputs = llama(depth)
    capture_s, program = seconds(lambda: fxc.trace(model, inputs))
    own = [seconds(ours(program))[0] for _ in range(rounds)]
    return {"kind": "llama", **timed(program, capture_s, own)}


def llama_8b(rounds: int) -> dict[str, Any]:
    """Analysis and plan of Llama 3.1 8B's shape; there are no weights to rank, so units are ranked at random."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval()
        inputs = {"input_ids": torch.zeros(2, 128, dtype=torch.long)}
    capture_s, program = seconds(lambda: fxc.trace(model, inputs))
    before_gb = peak_gb()
    analysis_s, _ = seconds(lambda: fxc.analyze(program, "channels"))
    plan_s, _ = seconds(lambda: fxc.analyze(program, "select-channels{ratio=0.5 criterion=random}"))
    return {
        "kind": "shape", "nodes": len(program.graph.nodes), "capture_s": round(capture_s, 2),
        "analysis_s": round(analysis_s, 3), "plan_s": round(plan_s, 3), "peak_gb": peak_gb(), "before_gb": before_gb,
    }  # fmt: skip


def peak_gb() -> float:
    """The most memory that this process has held."""
    status = Path("/proc/self/status").read_text()  # getrusage counts what the parent held as well
    return round(int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) / 2**20, 2)  # type: ignore[index]


def summary(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The claims, each with its figure."""
    ratios = [row["ratio"] for row in rows if row.get("ratio")]
    above = [row["ratio_above"] for row in rows if row.get("ratio_above")]
    if ratios:
        mean, least = statistics.geometric_mean(ratios), statistics.geometric_mean([*ratios, *above])
        yield f"{mean:.1f} times as fast as Torch-Pruning in the geometric mean of {len(ratios)} models"
        yield f"at least {least:.1f} times with the {len(above)} that it did not finish in {LIMIT_S} s"
    found = {row["subject"]: row for row in rows}
    for small, large in (("resnet18", "resnet152"), ("llama 2 layers", "llama 64 layers")):
        if small in found and large in found:
            growth = found[large]["ms_per_node"] / found[small]["ms_per_node"]
            yield f"time per node of {large} is {growth:.2f} that of {small}"


SUBJECTS: dict[str, Callable[[int], dict[str, Any]]] = {
    **{name: functools.partial(beside_torch_pruning, name) for name in MODELS},
    **{f"llama {depth} layers": functools.partial(of_depth, depth) for depth in LLAMA_DEPTHS},
    "llama 8B": llama_8b,
}
"""Name -> what measures it, given the number of rounds."""


if __name__ == "__main__":
    sys.exit(main())
