"""What tracing costs beside torch.export itself, and how it grows with depth.

For each depth, in interleaved rounds: seconds in torch.export, and seconds to normalise, raise and verify. The claim is
a ratio of at most 1 and a time per node that stays flat.

    python benchmarks/trace_time.py
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from coverage import Timings
from environment import write_results
from tabulate import tabulate
from torch import nn

import fxcompress as fxc


def llama(depth: int) -> tuple[nn.Module, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=depth, num_attention_heads=4,
        num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), {"input_ids": torch.randint(0, 256, (2, 16))}


def resnet(depth: int) -> tuple[nn.Module, Any]:
    from torchvision.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, [depth // 4] * 4, width_per_group=16).eval(), torch.randn(2, 3, 64, 64)


FAMILIES: dict[str, tuple[Callable[[int], tuple[nn.Module, Any]], tuple[int, ...]]] = {
    "Llama layers": (llama, (2, 4, 8, 16, 32, 64)),
    "ResNet bottlenecks": (resnet, (4, 8, 16, 32, 64)),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    rows = [row for family, (make, depths) in FAMILIES.items() for row in measure(family, make, depths, rounds)]
    columns = ("family", "depth", "nodes", "export_s", "rest_s", "ratio", "rest_ms_per_node")
    print(tabulate([[row[c] for c in columns] for row in rows], columns, floatfmt=".3f"))
    print(f"written to {write_results('trace_time', rows)}")
    return 0


def measure(
    family: str, make: Callable[[int], tuple[nn.Module, Any]], depths: tuple[int, ...], rounds: int
) -> list[dict[str, Any]]:
    """Medians over interleaved rounds."""
    logger = logging.getLogger("fxcompress.tracing.tracer")
    logger.setLevel(logging.INFO)
    subjects = {depth: make(depth) for depth in depths}
    fxc.trace(*subjects[depths[0]])  # the first export of a process pays for imports
    times: dict[int, list[Timings]] = defaultdict(list)
    nodes = {}
    for _ in range(rounds):
        for depth, (model, inputs) in subjects.items():
            timings = Timings()
            logger.handlers = [timings]
            nodes[depth] = len(fxc.trace(model, inputs).graph.nodes)
            times[depth].append(timings)
    rows = []
    for depth in depths:
        export = statistics.median(t.export_s for t in times[depth])
        rest = statistics.median(t.rest_s for t in times[depth])
        rows.append({
            "family": family, "depth": depth, "nodes": nodes[depth], "export_s": round(export, 3),
            "rest_s": round(rest, 3), "ratio": round(rest / export, 3),
            "rest_ms_per_node": round(1000 * rest / nodes[depth], 3), "rounds": rounds,
        })  # fmt: skip
    return rows


if __name__ == "__main__":
    sys.exit(main())
