"""The command line: ``fxcompress compress | inspect | passes | bench``."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version

from rich.logging import RichHandler

from fxcompress.cli.bench import add_to as add_bench
from fxcompress.cli.compress import add_to as add_compress
from fxcompress.cli.inspect import add_to as add_inspect
from fxcompress.cli.passes import add_to as add_passes
from fxcompress.cli.terminal import Terminal
from fxcompress.errors import FxCompressError

FAILED, INTERRUPTED = 2, 130
"""Exit codes: that of a wrong use or input, and the shell's for Ctrl-C."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; gives the exit code.

    Args:
        argv: Words after ``fxcompress``; those of the process if not given.
    """
    options = _parser().parse_args(argv)
    terminal = Terminal()
    _configure_logging(terminal, options.debug)
    try:
        options.command(options, terminal)
        sys.stdout.flush()
    except KeyboardInterrupt:
        terminal.error("interrupted; nothing was written")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output, such as 'head', has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except FxCompressError as error:
        if options.debug:
            raise
        terminal.error("\n".join([str(error), *getattr(error, "__notes__", ())]))
        return FAILED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("fxcompress", description="Makes PyTorch networks smaller and faster.")
    parser.add_argument("--version", action="version", version=f"fxcompress {version('fxcompress')}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add_command in (add_compress, add_inspect, add_passes, add_bench):
        add_command(commands)
    return parser


def _configure_logging(terminal: Terminal, debug: bool) -> None:
    handler = RichHandler(console=terminal.notes, show_path=False)
    logging.basicConfig(level=logging.INFO if debug else logging.ERROR, handlers=[handler], format="%(message)s")
    if not debug:
        warnings.simplefilter("ignore")  # those of libraries below, about what their own callers do
