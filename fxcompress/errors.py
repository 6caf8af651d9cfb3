"""Errors a user can act on: each message names the thing at fault and the remedy."""

from __future__ import annotations


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
    """An optional dependency is not installed; the message carries the ``pip install`` line."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        self.package = package
        self.extra = extra
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed. "
            f'Install it with: pip install "fxcompress[{extra}]"'
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
        super().__init__(f"{reason}\n  {text}\n  {' ' * position}^")
