"""Errors a user can act on: each message names the thing at fault and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FxCompressError(Exception):
    """Root of every error this library raises on purpose."""


class InputError(FxCompressError):
    """A value handed in does not fit: example inputs, weights, options, pipeline text, names."""


class CaptureError(FxCompressError):
    """A model cannot be captured into a Program (for example data-dependent control flow)."""


class VerificationError(FxCompressError):
    """A Program breaks the normal form or does not compute what it must."""


class ArtifactError(FxCompressError):
    """A file cannot be read or written, or does not hold what it should."""


class MissingExtraError(FxCompressError, ImportError):
    """An optional dependency is not installed, or too old; the message carries the ``pip install`` line."""

    def __init__(self, package: str, extra: str, purpose: str, problem: str = ", which is not installed") -> None:
        self.package = package
        self.extra = extra
        super().__init__(
            f'{purpose} needs the package {package!r}{problem}. Install it with: pip install "fxcompress[{extra}]"'
        )


class PipelineError(InputError):
    """A pipeline text is wrong at one place.

    Attributes:
        text: The whole pipeline text.
        position: Offset of the offending character in ``text``.
        reason: What is wrong there.
    """

    def __init__(self, text: str, position: int, reason: str) -> None:
        self.text = text
        self.position = position
        self.reason = reason
        start = text.rfind("\n", 0, position) + 1
        line = text[start:].partition("\n")[0].replace("\t", " ")
        super().__init__(f"{reason}\n  {line}\n  {' ' * (position - start)}^")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error message that names what was probably meant, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
