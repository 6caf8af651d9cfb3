"""``fxcompress inspect``: what a model is made of and what it costs."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxcompress.cli.options import MODEL_HELP, add, command, loaded, parts, parts_line, traced_or_islands
from fxcompress.cli.terminal import Terminal
from fxcompress.formatting import BYTES, MACS, PARAMS, counted
from fxcompress.ir.program import Diagnostic, Program
from fxcompress.report.build import match_layers
from fxcompress.report.rows import Figures, LayerRow
from fxcompress.report.text import by_depth
from fxcompress.tracing import PartialProgram


def add_to(commands: Any) -> None:
    """Adds the command."""
    parser = command(commands, "inspect", "Show a model's layers, what they cost, and how it was read", run)
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--graph", action="store_true", help="print the graph instead, one node a line")
    shown.add_argument("--depth", type=int, metavar="N", help="sum layers up by the first N parts of their names")
    add(parser, "--input", "--seed")


def run(options: argparse.Namespace, terminal: Terminal) -> None:
    """Prints the cost table, or the graph, of the model or of each of its islands."""
    model = traced_or_islands(loaded(options.model, options, terminal), terminal)
    for index, (title, program) in enumerate(parts(options.model, model).items()):
        if index:
            terminal.line()
        if not options.graph:
            _costs(title, program, options.depth, terminal)
            continue
        if isinstance(model, PartialProgram):
            terminal.heading(title)
        terminal.line(program.text())
    if isinstance(model, PartialProgram):
        terminal.line(parts_line(model))
        _diagnostics(model.diagnostics, terminal)


def _costs(title: str, program: Program, depth: int | None, terminal: Terminal) -> None:
    cost = program.analyze("cost").layers
    rows = list(match_layers(cost, cost))
    total = Figures.of(row.after for row in rows)
    terminal.heading(
        f"{title}: {PARAMS.text(total.params)} params, {MACS.text(total.macs)} MACs, "
        f"{BYTES.text(total.weight_bytes)} weights"
    )
    terminal.line(_interface(program))
    terminal.line()
    _layers(rows if depth is None else by_depth(rows, depth), total, terminal)
    _diagnostics(program.diagnostics, terminal)


def _interface(program: Program) -> str:
    """Inputs and outputs with their shapes; a size that may change is a symbol."""
    placeholders = [node for node in program.nodes if node.op == "placeholder"]
    names = {str(placeholders[index].meta["val"].shape[dim]): "batch" for index, dim in program.interface.batch.items()}
    results: Any = program.graph.output_node().args[0]
    inputs = [f"{node.name}: {_shape(node, names)}" for node in placeholders]
    outputs = [_shape(node, names) for node in results if isinstance(node, fx.Node)]
    return f"in   {', '.join(inputs)}\nout  {', '.join(outputs)}"


def _shape(node: fx.Node, names: Mapping[str, str]) -> str:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return repr(value)
    sizes = [names.get(str(size), str(size)) for size in value.shape]
    return f"{str(value.dtype).removeprefix('torch.')} ({', '.join(sizes)})"


def _layers(rows: Sequence[LayerRow], total: Figures, terminal: Terminal) -> None:
    shown = [row for row in rows if row.after is not None and (row.after.params or row.after.macs)]
    terminal.table(
        ["|layer", "|kind", "output", ">params", ">MACs", ">share", ">weights"],
        (_layer(row, total) for row in shown),
    )
    if len(shown) < len(rows):
        terminal.line(f"{counted(len(rows) - len(shown), 'other operation')} without weights or MACs")


def _layer(row: LayerRow, total: Figures) -> list[str]:
    figures = row.after
    assert figures is not None
    share = figures.macs / total.macs if total.macs else 0.0
    return [
        row.name,
        figures.kind,
        figures.shape,
        PARAMS.text(figures.params),
        MACS.text(figures.macs),
        f"{100 * share:.1f} %",
        BYTES.text(figures.weight_bytes),
    ]


def _diagnostics(diagnostics: Iterable[Diagnostic], terminal: Terminal) -> None:
    for each in diagnostics:
        terminal.line(f"\n{each}")
