"""``fxcompress bench``: models on engines, speed beside fidelity."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from fxcompress.cli.options import MODEL_HELP, add, command, loaded, parts, parts_line, traced_or_islands
from fxcompress.cli.terminal import Terminal
from fxcompress.engines.bench import EngineRow, bench
from fxcompress.engines.compile import ENGINES
from fxcompress.formatting import BYTES, counted
from fxcompress.ir.program import Program
from fxcompress.tracing import PartialProgram
from fxcompress.verification.numerics import Comparison

_DEFAULT = ("eager", "onnxruntime", "openvino")


def add_to(commands: Any) -> None:
    """Adds the command."""
    parser = command(commands, "bench", "Measure models on engines: latency, size, and how true the output stays", run)
    parser.add_argument("models", metavar="MODEL", nargs="+", help=MODEL_HELP)
    parser.add_argument(
        "--engine",
        action="append",
        choices=sorted(ENGINES),
        help=f"an engine beside eager; once for each (default: {', '.join(_DEFAULT[1:])})",
    )
    add(parser, "--batch", "--rounds", "--input", "--seed")


def run(options: argparse.Namespace, terminal: Terminal) -> None:
    """Measures and prints one table per model, or per island of a model that cannot be captured whole."""
    first = True
    for reference in options.models:
        model = traced_or_islands(loaded(reference, options, terminal), terminal)
        for title, program in parts(reference, model).items():
            if not first:
                terminal.line()
            first = False
            _measure(title, program, options, terminal)
        if isinstance(model, PartialProgram):
            terminal.line(parts_line(model))


def _measure(title: str, program: Program, options: argparse.Namespace, terminal: Terminal) -> None:
    with terminal.progress(f"measuring {title}", "rounds") as bar:
        rows = bench(program, options.engine or _DEFAULT, batch=options.batch, rounds=options.rounds, on_round=bar)
    _show(f"{title}, batch {options.batch}, {counted(torch.get_num_threads(), 'thread')}", rows, terminal)


def _show(title: str, rows: list[EngineRow], terminal: Terminal) -> None:
    terminal.heading(title)
    terminal.table(
        ["engine", ">latency", ">spread", ">vs eager", ">size", ">max rel error", ">SQNR"],
        [_cells(row) for row in rows if not row.failure],
    )
    for row in rows:
        if row.failure:
            terminal.line(f"{row.engine}: {row.failure}")


def _cells(row: EngineRow) -> list[str]:
    assert row.latency is not None
    assert row.size is not None
    assert row.fidelity is not None
    return [
        row.engine,
        f"{row.latency.median * 1e3:.3g} ms",
        f"± {50 * row.latency.spread:.0f} %",
        f"{row.speedup:.2f}x",
        BYTES.text(row.size),
        *_fidelity(row.fidelity),
    ]


def _fidelity(found: Comparison) -> tuple[str, str]:
    return ("bit-equal", "") if found.exact else (f"{found.max_rel_error:.1e}", f"{found.sqnr_db:.0f} dB")
