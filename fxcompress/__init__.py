"""A compiler that makes neural networks smaller and faster."""

from fxcompress.errors import (
    ArtifactError,
    CaptureError,
    FxCompressError,
    InputError,
    MissingExtraError,
    PipelineError,
    VerificationError,
)
from fxcompress.program import Diagnostic, Program
from fxcompress.tracing import trace

__all__ = [
    "ArtifactError",
    "CaptureError",
    "Diagnostic",
    "FxCompressError",
    "InputError",
    "MissingExtraError",
    "PipelineError",
    "Program",
    "VerificationError",
    "trace",
]
