"""What the command line prints, and how: results to stdout, progress and errors to stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

_PIPED_WIDTH = 160
"""Columns where nobody sees them: a file or another program."""
_LEAST_WRAPPED = 14
"""Columns that text which may wrap gets at least."""


class Terminal:
    """Two consoles.

    Attributes:
        out: Results, on stdout.
        notes: Progress and errors, on stderr.
    """

    def __init__(self) -> None:
        self.out = _console(stderr=False)
        self.notes = _console(stderr=True)

    def line(self, text: str = "") -> None:
        """Prints text as it is: no markup, no wrapping."""
        self.out.print(text, markup=False, highlight=False, soft_wrap=True)

    def heading(self, text: str) -> None:
        """Prints a line that starts something."""
        self.out.print(Text(text, "bold"), soft_wrap=True)

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Prints a table no wider than the terminal.

        Args:
            columns: Headers; one that starts with ``|`` may wrap, one that starts with ``>`` is aligned right.
            rows: Cells.
        """
        cells = [*rows]
        made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
        for index, header in enumerate(columns):
            title, wraps = header.lstrip(">|"), header.startswith("|")
            width = max(map(cell_len, [title, *(row[index] for row in cells)]))
            made.add_column(
                title,
                justify="right" if header.startswith(">") else "left",
                overflow="fold",
                min_width=min(width, _LEAST_WRAPPED) if wraps else width,
            )
        for row in cells:
            made.add_row(*map(Text, row))
        with self.out.capture() as printed:
            self.out.print(made)
        for line in printed.get().splitlines():
            self.out.file.write(line.rstrip() + "\n")

    def note(self, text: str) -> None:
        """Prints a remark beside the results."""
        self.notes.print(Text(text), soft_wrap=True)

    def error(self, message: str) -> None:
        """Prints an error."""
        self.notes.print(Text.assemble(("fxcompress: ", "bold red"), message), soft_wrap=True)

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        """Shows that something without known length goes on."""
        with self.notes.status(Text(f"{what} …")):
            yield

    @contextmanager
    def progress(self, what: str, unit: str) -> Iterator[ProgressBar]:
        """Shows how far something with a known number of steps is."""
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(24),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
        )
        hidden = not self.notes.is_terminal
        with Progress(*columns, console=self.notes, transient=True, disable=hidden) as bars:
            yield ProgressBar(bars, what)


class ProgressBar:
    """One bar of :meth:`Terminal.progress`."""

    def __init__(self, bars: Progress, what: str) -> None:
        self._bars = bars
        self._task = bars.add_task(what, total=None, note="")

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Moves the bar."""
        self._bars.update(self._task, completed=done, total=total, note=note)


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    known = stream.isatty() or "COLUMNS" in os.environ
    return Console(stderr=stderr, width=None if known else _PIPED_WIDTH)
