"""Coverage: every model of the zoo through the checks of capture, of channel removal, of a peer's removal, or of int8.

One process a model, memory-capped, resumable: results are appended to ``results/KIND_coverage.jsonl`` as they come, and
models that are in it already are skipped. ``--only PATTERN`` narrows the run, ``--again`` runs failures anew.

    python benchmarks/coverage.py
    python benchmarks/coverage.py peer       # optional, Torch-Pruning: shown beside removal
    python benchmarks/coverage.py removal
    python benchmarks/coverage.py int8
    python benchmarks/coverage.py --only 'timm:*vit*' --jobs 2
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import json
import logging
import multiprocessing
import os
import resource
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
KINDS = {"capture": "coverage", "removal": "removal_coverage", "peer": "peer_coverage", "int8": "int8_coverage"}
"""Kind of checks -> name of its results."""

PRELOADED = ["torch", "torchvision", "timm", "transformers", "networkx", "sympy", "fxcompress", "zoo", "warm"]
MEMORY_GB = 14
TIMEOUT_S = 900
MACS_TARGET = 0.35


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="?", choices=KINDS, default="capture", help="what to check")
    parser.add_argument("--only", default="*", help="run models whose name matches this pattern")
    parser.add_argument("--jobs", type=int, default=1, help="models at the same time")
    parser.add_argument("--again", action="store_true", help="run models anew that failed before")
    parser.add_argument("--model", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.model:
        print(json.dumps(examine(options.model, options.checks)))
        return 0
    return run_all(options.checks, options.only, options.jobs, options.again)


def run_all(checks: str, pattern: str, jobs: int, again: bool) -> int:
    import zoo
    from rich.progress import track

    wanted = [name for name in zoo.names() if fnmatch.fnmatch(name, pattern)]
    log = RESULTS / f"{KINDS[checks]}.jsonl"
    RESULTS.mkdir(exist_ok=True)
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])  # for what is preloaded
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", PYTHONPATH=path)
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    done = {row["model"]: row for row in read_results(log)}
    pending = [name for name in wanted if name not in done or (again and not done[name]["ok"])]
    with ThreadPoolExecutor(jobs) as pool, log.open("a") as sink:
        futures = [pool.submit(in_process, name, checks) for name in pending]
        for future in track(as_completed(futures), total=len(futures), description="coverage"):
            row = future.result()
            done[row["model"]] = row
            sink.write(json.dumps(row) + "\n")
            sink.flush()
    peer_rows = read_results(RESULTS / f"{KINDS['peer']}.jsonl") if checks == "removal" else []
    peers = {row["model"]: row for row in peer_rows}
    rows = [{**done[name], **beside(peers.get(name))} for name in wanted]
    summarise(KINDS[checks], rows)
    return 0 if all(row["ok"] for row in rows) else 1


def read_results(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def beside(peer: dict[str, Any] | None) -> dict[str, Any]:
    """What a row of removal says of the peer, which runs apart: MACs left, or why it failed."""
    if peer is None:
        return {}
    return {"peer_macs_ratio": peer["peer_macs_ratio"]} if peer["ok"] else {"peer_failed": peer["failed"]}


def in_process(name: str, checks: str) -> dict[str, Any]:
    """Examines one model in a process of its own; a crash or time-out is a result too.

    The processes are forked from one that has the libraries imported, which takes longer than many a model.
    """
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(name, checks, sender), daemon=True)
    process.start()
    sender.close()
    try:
        if receiver.poll(TIMEOUT_S):
            return receiver.recv()  # type: ignore[no-any-return]
        return {"model": name, "ok": False, "failed": f"no answer in {TIMEOUT_S} s"}
    except EOFError:
        process.join()
        return {"model": name, "ok": False, "failed": f"crash with exit code {process.exitcode}"}
    finally:
        process.kill()


def answer(name: str, checks: str, sender: Connection) -> None:
    """Sends the row of one model; what libraries print is of no use here."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        sender.send(examine(name, checks))


class Timings(logging.Handler):
    """Reads the times that tracing logs."""

    def __init__(self) -> None:
        super().__init__()
        self.export_s = self.rest_s = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        if isinstance(record.args, tuple) and len(record.args) == 3:
            self.export_s += float(record.args[1])  # type: ignore[arg-type]
            self.rest_s += float(record.args[2])  # type: ignore[arg-type]


def examine(name: str, checks: str) -> dict[str, Any]:
    """All checks of one kind on one model; ``failed`` names the first that does not hold."""
    import torch
    import zoo

    kind = importlib.import_module(f"{checks}_checks")

    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_GB << 30, MEMORY_GB << 30))
    torch.set_num_threads(1)
    timings = Timings()
    trace_logger = logging.getLogger("fxcompress.tracing.tracer")
    trace_logger.addHandler(timings)
    trace_logger.setLevel(logging.INFO)
    row: dict[str, Any] = {"model": name, "ok": False}
    started = time.perf_counter()
    stage = "build"
    try:
        subject = zoo.build(name)
        stages = kind.ISLAND_CHECKS if subject.islands else kind.CHECKS
        for stage in stages:
            begun = time.process_time()
            row.update(stages[stage](subject, row))
            row[f"{stage}_cpu_s"] = round(time.process_time() - begun, 1)
        row["ok"] = True
    except Exception as error:
        row["failed"] = f"{stage}: {type(error).__name__}: {str(error)[:600]}"
    row.update(export_s=round(timings.export_s, 2), rest_s=round(timings.rest_s, 2))
    row.update(
        seconds=round(time.perf_counter() - started, 1),
        peak_gb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    )
    return {key: value for key, value in row.items() if not key.startswith("_")}


def summarise(results: str, rows: list[dict[str, Any]]) -> None:
    from environment import write_results
    from tabulate import tabulate

    table = []
    for source in sorted({row["model"].partition(":")[0] for row in rows}):
        members = [row for row in rows if row["model"].startswith(source + ":")]
        good = [row for row in members if row["ok"]]
        exports, rest = (sum(row.get(key, 0.0) for row in members) for key in ("export_s", "rest_s"))
        table.append(
            [
                source,
                len(members),
                len(good),
                f"{100 * len(good) / len(members):.1f} %",
                f"{rest / exports:.2f}" if exports else "-",
                median_of(members, "macs_ratio"),
                median_of(members, "peer_macs_ratio"),
                round(sum(row.get("seconds", 0) for row in members)),
            ]
        )
    print(
        tabulate(table, ["source", "models", "pass", "share", "rest / export time", "MACs left", "peer's", "seconds"])
    )
    missed = [row for row in rows if row.get("macs_ratio", 0) > MACS_TARGET]
    for row in sorted(missed, key=lambda row: -row["macs_ratio"]):
        print(f"  {row['model']}: keeps {row['macs_ratio']:.3f} of its MACs")
    for row in rows:
        if not row["ok"]:
            print(f"  {row['model']}: {row['failed']}")
    print(f"written to {write_results(results, rows)}")


def median_of(rows: list[dict[str, Any]], key: str) -> str:
    found = [row[key] for row in rows if row.get(key) is not None]
    return f"{statistics.median(found):.3f} ({len(found)})" if found else "-"


if __name__ == "__main__":
    sys.exit(main())
