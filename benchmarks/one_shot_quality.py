"""What one-shot channel removal leaves of a trained network, without any training after it, beside Torch-Pruning.

EfficientNet-Lite0 with its ImageNet weights, on crops of photographs that no one calibrated on: how often the slim
network names the class that the whole one names (top-1 agreement), and the divergence of its probabilities from those
of the whole one, at 10, 20 and 30 % fewer multiply-accumulates. Every criterion of ours runs with and without
``compensate``, and those that Torch-Pruning has too with uniform, global and isomorphic ranking. Torch-Pruning's run
with local, global and isomorphic ranking, at the largest ratio-searched share of MACs below the same target. Both get
the same crops, labels (the whole network's) and loss. MACs are counted alike, by PyTorch's own counter.

    python benchmarks/one_shot_quality.py
    python benchmarks/one_shot_quality.py --only 'ours fisher*' --macs 0.8 --crops 4 --log rows.jsonl

Seconds are of one processor; a criterion is measured once, in its first row.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import importlib.util
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from environment import RESULTS, write_results
from fxcompress.passes.channels import criteria
from photographs import CALIBRATION, TEST, crops, efficientnet_lite0
from tabulate import tabulate
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import fxcompress as fxc

SHARES = (0.9, 0.8, 0.7)
SIZE = 224
NO_DATA = ("l1", "l2", "lamp", "fpgm", "bn-gamma", "random")
FROM_DATA = ("activation", "variance", "wanda", "flap", "taylor", "fisher", "output")
SCOPES: dict[str, dict[str, bool]] = {
    "local": {}, "global": {"global_pruning": True}, "isomorphic": {"global_pruning": True, "isomorphic": True},
}  # fmt: skip
SAME = {"fisher": "hessian"}
"""Our name of a criterion -> Torch-Pruning's, where they differ."""
SAMPLED = ("taylor", "fisher")
"""Criteria of the gradients of single samples."""
SAMPLES = 1000
BATCHES = 16
STEPS = 8
CLOSE = 0.003
"""Share of the whole MACs below the target at which the search for their ratio stops."""
BATCH = 4


@dataclass(frozen=True, eq=False)
class Subject:
    """The network, and what may be known about it.

    Attributes:
        model: The whole network.
        calibration: Crops of each calibration photograph.
        test: Crops of the test photographs.
    """

    model: nn.Module
    calibration: list[torch.Tensor]
    test: torch.Tensor

    @cached_property
    def expected(self) -> torch.Tensor:
        return logits(self.model, self.test)

    @cached_property
    def training(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of one crop of each photograph, labelled by the whole network."""
        batches = [torch.stack(rows) for rows in zip(*self.calibration, strict=True)]
        return [(batch, logits(self.model, batch).argmax(1)) for batch in batches]

    @cached_property
    def task(self) -> fxc.Task:
        """The same for ours: photographs to calibrate on, and single samples to derive the loss of."""
        samples = [
            pair for images, labels in self.training for pair in zip(images.split(1), labels.split(1), strict=True)
        ]
        return fxc.Task(
            calibration=self.calibration,
            training=samples,
            loss=lambda outputs, batch: functional.cross_entropy(outputs, batch[1]),
        )

    @cached_property
    def program(self) -> fxc.Program:
        return fxc.trace(self.model, self.test[:2].clone())

    @cached_property
    def macs(self) -> int:
        return macs(self.model)


def logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(batch) for batch in images.split(BATCH)])


def macs(model: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, SIZE, SIZE))
    return int(counter.get_total_flops()) // 2


# --- ours ------------------------------------------------------------------------------------------------------------


def ours(subject: Subject, share: float, criterion: str, scope: str, way: str) -> nn.Module:
    ranking = f" scope={scope}" if scope else ""
    select = f"select-channels{{macs={share} criterion={measured(subject, criterion)}{ranking}}}"
    passes = {"alone": "remove-channels", "compensate": "compensate,remove-channels"}[way]
    done = fxc.PassManager(f"{select},{passes}", instruments=[]).run(subject.program, subject.task)
    return done.program.emit()


@cache
def measured(subject: Subject, name: str) -> str:
    """The name of a criterion that gives what another one says: measured once, for all shares and ways."""
    found, batches = criteria.criterion_of(name), SAMPLES if name in SAMPLED else BATCHES
    evidence = criteria.Evidence(subject.program, subject.program.analyze("channels"), subject.task, batches)
    scores = found.measure(evidence)
    criteria.criterion(f"measured-{name}", scale=found.scale)(lambda evidence: scores)
    return f"measured-{name}"


def our_runs(subject: Subject, share: float) -> Iterator[tuple[str, str, Callable[[], nn.Module]]]:
    """Criterion, way and work; the ranking is the default one where the way names none."""
    for name in (*NO_DATA, *FROM_DATA):
        for scope in rankings(name):
            for way in ("alone", "compensate"):
                yield name, f"{scope} {way}".strip(), partial(ours, subject, share, name, scope, way)


def rankings(name: str) -> list[str]:
    """The default one, which has no name here, and the others where Torch-Pruning has the criterion too."""
    default = "global" if criteria.criterion_of(name).scale == "loss" else "uniform"
    shared = name in (*NO_DATA, *SAMPLED)
    return ["", *(scope for scope in ("uniform", "global", "isomorphic") if shared and scope != default)]


# --- Torch-Pruning ---------------------------------------------------------------------------------------------------


def their_runs(subject: Subject, share: float) -> Iterator[tuple[str, str, Callable[[], nn.Module]]]:
    """Criterion, scope and work."""
    importances = their_importances() if importlib.util.find_spec("torch_pruning") else {}
    for criterion in importances:
        for scope in SCOPES:
            yield criterion, scope, lambda c=criterion, s=scope: theirs(subject, share, c, s)


def their_importances() -> dict[str, Callable[[], Any]]:
    from torch_pruning import importance

    return {
        "l1": lambda: importance.GroupMagnitudeImportance(p=1),
        "l2": lambda: importance.GroupMagnitudeImportance(p=2),
        "lamp": importance.LAMPImportance,
        "fpgm": importance.FPGMImportance,
        "bn-gamma": importance.BNScaleImportance,
        "random": importance.RandomImportance,
        "taylor": importance.GroupTaylorImportance,
        "hessian": importance.GroupHessianImportance,
    }


def theirs(subject: Subject, share: float, criterion: str, scope: str) -> nn.Module:
    """The largest slim network within the share that a search for the ratio finds."""
    target, found = share * subject.macs, {0.0: (subject.macs, None), 1.0: (0, None)}
    for _ in range(STEPS):
        low = max(ratio for ratio, (size, _) in found.items() if size > target)
        high = min(ratio for ratio, (size, _) in found.items() if size <= target)
        if found[high][0] > (share - CLOSE) * subject.macs:
            break
        aim = (found[low][0] - target + CLOSE / 2 * subject.macs) / (found[low][0] - found[high][0])
        ratio = low + (high - low) * min(max(aim, 0.1), 0.9)
        slim = pruned(subject, ratio, criterion, scope)
        found[ratio] = (0 if slim is None else macs(slim), slim)
    within = [(size, number, slim) for number, (size, slim) in enumerate(found.values()) if size <= target]
    slim = max(within)[2]
    assert slim is not None
    return slim


def pruned(subject: Subject, ratio: float, criterion: str, scope: str) -> nn.Module | None:
    """One step of Torch-Pruning at a ratio; ``None`` where it leaves a network that does not run."""
    import torch_pruning

    slim = copy.deepcopy(subject.model)
    if criterion in ("taylor", "hessian"):
        for parameter, gradient in zip(slim.parameters(), gradients(subject, criterion), strict=True):
            parameter.grad = gradient.clone()
    torch.manual_seed(0)
    pruner = torch_pruning.pruner.BasePruner(
        slim, torch.zeros(1, 3, SIZE, SIZE), their_importances()[criterion](), pruning_ratio=ratio,
        ignored_layers=[slim.get_submodule("classifier")], **SCOPES[scope],
    )  # fmt: skip
    pruner.step()
    try:
        macs(slim)
    except RuntimeError:
        return None
    return slim.requires_grad_(False)


@cache
def gradients(subject: Subject, criterion: str) -> list[torch.Tensor]:
    """What Torch-Pruning's criteria read from ``grad``: for Hessian the sum of squares over samples.

    Its ``accumulate_grad`` keeps only the last sample, so they are summed here.
    """
    parameters = list(subject.model.parameters())
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    for images, labels in subject.training:
        size = 1 if criterion == "hessian" else len(images)
        for some, theirs in zip(images.split(size), labels.split(size), strict=True):
            found = torch.autograd.grad(functional.cross_entropy(subject.model(some), theirs), parameters)
            for total, gradient in zip(sums, found, strict=True):
                total += gradient.square() if criterion == "hessian" else gradient
    return sums


# --- measuring -------------------------------------------------------------------------------------------------------


def measure(subject: Subject, shares: list[float], only: str, log: Path | None) -> Iterator[dict[str, Any]]:
    """The rows; those that the log has are taken from there, and others are added to it."""
    known = {}
    if log is not None and log.exists():
        rows = map(json.loads, log.read_text().splitlines())
        known = {(row["tool"], row["criterion"], row["way"], row["share"]): row for row in rows}
    for share in shares:
        for tool, runs in (("ours", our_runs), ("theirs", their_runs)):
            for criterion, way, work in runs(subject, share):
                key = tool, criterion, way, share
                if key not in known and fnmatch.fnmatch(f"{tool} {criterion} {way}", only):
                    known[key] = dict(zip(("tool", "criterion", "way", "share"), key, strict=True)) | run(subject, work)
                    print(*known[key].values(), "s", flush=True)
                    if log is not None:
                        with log.open("a") as file:
                            file.write(json.dumps(known[key]) + "\n")
                if key in known:
                    yield known[key]


def run(subject: Subject, work: Callable[[], nn.Module]) -> dict[str, float]:
    started = time.process_time()
    slim = work()
    seconds = round(time.process_time() - started, 1)
    return {"macs": round(macs(slim) / subject.macs, 4), **quality(subject, slim), "seconds": seconds}


def quality(subject: Subject, slim: nn.Module) -> dict[str, float]:
    """Top-1 agreement in percent, and the divergence of probabilities in nats, from the whole network."""
    found, expected = logits(slim, subject.test), subject.expected
    agreement = (found.argmax(1) == expected.argmax(1)).double().mean()
    divergence = functional.kl_div(
        found.log_softmax(1), expected.log_softmax(1), log_target=True, reduction="batchmean"
    )
    return {"agreement": round(100 * float(agreement), 1), "divergence": round(float(divergence), 3)}


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each tool, criterion and way; agreement (divergence) at each share."""
    shares = sorted({row["share"] for row in rows}, reverse=True)
    lines: dict[tuple[str, str, str], dict[float, str]] = {}
    for row in rows:
        shown = f"{row['agreement']:.1f} ({row['divergence']:.2f})"
        lines.setdefault((row["tool"], row["criterion"], row["way"]), {})[row["share"]] = shown
    made = [[*key, *(cells.get(share, "") for share in shares)] for key, cells in lines.items()]
    return tabulate(made, ["tool", "criterion", "way", *(f"{share:.0%} of MACs" for share in shares)])


def best(rows: list[dict[str, Any]], share: float, tool: str, *criteria: str) -> dict[str, Any] | None:
    chosen = [row for row in rows if row["share"] == share and row["tool"] == tool]
    chosen = [row for row in chosen if not criteria or row["criterion"] in criteria]
    return max(chosen, key=lambda row: (row["agreement"], -row["divergence"]), default=None)


def summary(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Ours beside the best of theirs, at each share, as a whole and for criteria of the same name."""
    for share in sorted({row["share"] for row in rows}, reverse=True):
        for criterion in ("", *NO_DATA, *FROM_DATA):
            names = (criterion,) if criterion else ()
            own = best(rows, share, "ours", *names)
            peer = best(rows, share, "theirs", *(SAME.get(name, name) for name in names))
            if own and peer:
                verdict = "wins" if own["agreement"] > peer["agreement"] else "does not win"
                yield (
                    f"{share:.0%} {criterion or 'best':10s} ours {own['agreement']:5.1f} ({own['criterion']}, "
                    f"{own['way']}) theirs {peer['agreement']:5.1f} ({peer['criterion']}, {peer['way']}): {verdict}"
                )


def draw(rows: list[dict[str, Any]]) -> None:
    """Writes ``results/one_shot_quality.png``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5))
    colours = dict(zip((*NO_DATA, *FROM_DATA), pyplot.get_cmap("tab20").colors, strict=False))
    colours |= {theirs: colours[own] for own, theirs in SAME.items()}
    shares = sorted({row["share"] for row in rows}, reverse=True)
    for tool, style, shown in (("ours", "-", "fxcompress"), ("theirs", ":", "Torch-Pruning")):
        for criterion in dict.fromkeys(row["criterion"] for row in rows if row["tool"] == tool):
            points = [(share, best(rows, share, tool, criterion)) for share in shares]
            known = [(100 * (1 - share), point["agreement"]) for share, point in points if point is not None]
            axes.plot(
                *zip((0, 100), *known, strict=True), style, marker="o", markersize=3, color=colours[criterion],
                label=f"{shown} {criterion}",
            )  # fmt: skip
    axes.set(xlabel="% fewer MACs", ylabel="top-1 agreement with the whole network, %", ylim=(0, 101))
    axes.set_title("EfficientNet-Lite0, one-shot: best of each criterion's ways")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(RESULTS / "one_shot_quality.png", dpi=130)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crops", type=int, default=10, help="of each calibration photograph")
    parser.add_argument("--test-crops", type=int, default=24, help="of each test photograph")
    parser.add_argument("--macs", type=float, nargs="+", default=list(SHARES), help="shares of MACs to keep")
    parser.add_argument("--only", default="*", help="run what matches this pattern of 'TOOL CRITERION WAY'")
    parser.add_argument("--log", type=Path, help="keep rows in this file, and do not run again what it has")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    subject = Subject(
        efficientnet_lite0(),
        [crops(name, options.crops, SIZE, seed) for seed, name in enumerate(CALIBRATION)],
        torch.cat([crops(name, options.test_crops, SIZE, 1000 + seed) for seed, name in enumerate(TEST)]),
    )
    rows = list(measure(subject, options.macs, options.only, options.log))
    print(table(rows))
    print("\n".join(summary(rows)))
    if options.only == "*":
        print(f"written to {write_results('one_shot_quality', rows)}")
        draw(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
