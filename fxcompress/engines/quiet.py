"""Keeps what exporters say to themselves."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO

logger = logging.getLogger(__name__)


@contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Keeps progress lines, notices and the logs of these loggers back; errors still come as exceptions."""
    talkers = [logging.getLogger(name) for name in loggers]
    before = [talker.level for talker in talkers]
    said = StringIO()
    try:
        for talker in talkers:
            talker.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), redirect_stdout(said):
            warnings.simplefilter("ignore")
            yield
    finally:
        for talker, level in zip(talkers, before, strict=True):
            talker.setLevel(level)
        if said.getvalue():
            logger.debug("the exporter said: %s", said.getvalue())
