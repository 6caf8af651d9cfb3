"""``fxcompress passes``: what a pipeline can be made of."""

from __future__ import annotations

import argparse
import inspect
from typing import Any

from fxcompress import registry
from fxcompress.cli.options import command
from fxcompress.cli.terminal import Terminal
from fxcompress.pass_base import Transform
from fxcompress.pipeline.recipes import RECIPES
from fxcompress.registry import CatalogEntry


def add_to(commands: Any) -> None:
    """Adds the command."""
    parser = command(commands, "passes", "List the passes and recipes, or explain one pass", run)
    parser.add_argument("name", nargs="?", metavar="NAME", help="the pass to explain")


def run(options: argparse.Namespace, terminal: Terminal) -> None:
    """Prints all passes, or one."""
    if options.name is None:
        _list(terminal)
    else:
        _explain(options.name, terminal)


def _list(terminal: Terminal) -> None:
    rows = [[f"{entry.name}{_options(entry)}", entry.kind, entry.summary] for entry in registry.catalog()]
    terminal.table(["|pass", "kind", "|what it does"], rows)
    terminal.line()
    terminal.table(["recipe", "|pipeline"], [[name, text.replace(",", ", ")] for name, text in RECIPES.items()])
    terminal.line("\n'fxcompress passes NAME' explains a pass.")


def _options(entry: CatalogEntry) -> str:
    """The options as in pipeline text, with their defaults; ``...`` where a value must be given."""
    given = [f"{option.name}={'...' if option.default is None else option.default}" for option in entry.options]
    return f"{{{' '.join(given)}}}" if given else ""


def _explain(name: str, terminal: Terminal) -> None:
    cls = registry.get(name)
    entry = next(entry for entry in registry.catalog() if entry.name == name)
    terminal.heading(f"{name} ({_kind(cls, entry)})")
    body = inspect.cleandoc(cls.__doc__ or "").partition("\nAttributes:")[0].strip()
    terminal.line(body.replace("``", ""))
    for title, names in (("requires", cls.requires), ("preserves", getattr(cls, "preserves", ()))):
        if names:
            terminal.line(f"\n{title}: {', '.join(names)}")
    if entry.options:
        terminal.line()
        rows = [[each.name, each.type.label, each.default or "must be given", each.doc] for each in entry.options]
        terminal.table(["option", "|takes", "default", "|what it does"], rows)


def _kind(cls: Any, entry: CatalogEntry) -> str:
    return f"{cls.guarantee} {entry.kind}" if issubclass(cls, Transform) else entry.kind
