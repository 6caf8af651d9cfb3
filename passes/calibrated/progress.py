"""Progress of long work, where someone looks on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from fxcompress.passes.calibrated.streams import Streams
from rich.console import Console
from rich.progress import track
from torch import fx

Batch = TypeVar("Batch")


def shown(streams: Streams, name: str) -> Iterator[fx.Node]:
    """The nodes, with a progress bar of that name on a terminal."""
    console = Console(stderr=True)
    hidden = not console.is_terminal
    yield from track(streams, name, len(streams), console=console, transient=True, disable=hidden)


def shown_batches(batches: Iterable[Batch], name: str) -> Iterator[Batch]:
    """The batches, with a progress bar of that name on a terminal."""
    console = Console(stderr=True)
    total = len(batches) if isinstance(batches, Sized) else None
    yield from track(batches, name, total, console=console, transient=True, disable=not console.is_terminal)
