"""The options that commands share, each defined once, and the models that they lead to."""

from __future__ import annotations

import argparse
from textwrap import shorten
from typing import Any

from fxcompress.cli.example_inputs import BATCH, SYNTAX
from fxcompress.cli.models import FORMS, LoadedModel, load_model
from fxcompress.cli.terminal import Terminal
from fxcompress.errors import CaptureError
from fxcompress.formatting import counted
from fxcompress.ir.program import Program
from fxcompress.pipeline.recipes import RECIPES
from fxcompress.tracing import PartialProgram, trace, trace_islands

_OPTIONS: dict[str, dict[str, Any]] = {
    "--batch": {
        "type": int,
        "default": 1,
        "metavar": "N",
        "help": "rows of input when latency is measured (default: 1)",
    },
    "--debug": {"action": "store_true", "help": "log what happens, and show where an error comes from"},
    "--input": {
        "action": "append",
        "default": [],
        "metavar": "SIZES",
        "help": f"an example input without its batch dim ({BATCH} rows are made), in the form {SYNTAX}; "
        "once for each input (default: what the model's source declares)",
    },
    "--recipe": {
        "metavar": "NAME",
        "help": f"pipeline by name: {', '.join(RECIPES)} (default: default, or half-int8 for the built-in task)",
    },
    "--pipeline": {"metavar": "TEXT", "help": "passes to run, such as 'fold-constants,fold-batchnorm'"},
    "--rounds": {"type": int, "default": 25, "metavar": "N", "help": "rounds of measurements at most (default: 25)"},
    "--seed": {"type": int, "default": 0, "metavar": "N", "help": "seed of random weights and inputs (default: 0)"},
}

MODEL_HELP = FORMS


def command(commands: Any, name: str, summary: str, run: Any) -> argparse.ArgumentParser:
    """A command's parser, with what every command takes."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=f"{summary}.")
    parser.set_defaults(command=run)
    add(parser, "--debug")
    return parser


def add(parser: Any, *names: str) -> None:
    """Adds shared options to a parser."""
    for name in names:
        parser.add_argument(name, **_OPTIONS[name])


def loaded(reference: str, options: argparse.Namespace, terminal: Terminal) -> LoadedModel:
    """The model that a reference names, with the inputs that the options say."""
    with terminal.working(f"loading {reference}"):
        return load_model(reference, options.input, options.seed)


def traced(found: LoadedModel, terminal: Terminal) -> Program:
    """A loaded model as a Program."""
    if isinstance(found.model, Program):
        return found.model
    with terminal.working(f"tracing {found.name}"):
        return trace(found.model, found.example_inputs)


def traced_or_islands(found: LoadedModel, terminal: Terminal) -> Program | PartialProgram:
    """A loaded model as a Program or, where it cannot be captured whole, as the islands that can."""
    if isinstance(found.model, Program):
        return found.model
    try:
        return traced(found, terminal)
    except CaptureError as error:
        terminal.note(f"taken in parts: {shorten(str(error).partition(' Remedy:')[0], 200, placeholder=' …')}")
    with terminal.working(f"finding the parts of {found.name} that can be captured"):
        return trace_islands(found.model, found.example_inputs)


def parts(name: str, model: Program | PartialProgram) -> dict[str, Program]:
    """Title -> Program: the whole model, or each of its islands."""
    if isinstance(model, Program):
        return {name: model}
    return {f"{name}, {path}": island for path, island in model.islands.items()}


def parts_line(partial: PartialProgram) -> str:
    """Which parts were captured, and what was left in Python."""
    islands = f"{counted(len(partial.islands), 'island')}: {', '.join(partial.islands)}"
    left = ", ".join(each.path for each in partial.diagnostics if each.path)
    return f"\n{islands}\nleft in Python: the code around them{left and f' and in {left}'}"
