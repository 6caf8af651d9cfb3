"""A compiler that makes neural networks smaller and faster."""

from importlib.metadata import version

from fxcompress.analysis import analyze
from fxcompress.artifact import load, save
from fxcompress.compress import Compressed, compress
from fxcompress.engines.compile import CompiledModel, compile
from fxcompress.engines.export import Exported, export
from fxcompress.errors import (
    ArtifactError,
    CaptureError,
    FxCompressError,
    InputError,
    MissingExtraError,
    PipelineError,
    VerificationError,
)
from fxcompress.ir.program import Diagnostic, Program
from fxcompress.manager.pass_manager import PassManager, Result
from fxcompress.pass_base import Analysis, PassResult, Refusal, Transform
from fxcompress.pipeline.text import Pipeline, parse
from fxcompress.registry import register
from fxcompress.report import Report
from fxcompress.task import Task
from fxcompress.tracing import PartialProgram, trace, trace_islands

__version__ = version("fxcompress")

__all__ = [
    "Analysis",
    "ArtifactError",
    "CaptureError",
    "CompiledModel",
    "Compressed",
    "Diagnostic",
    "Exported",
    "FxCompressError",
    "InputError",
    "MissingExtraError",
    "PartialProgram",
    "PassManager",
    "PassResult",
    "Pipeline",
    "PipelineError",
    "Program",
    "Refusal",
    "Report",
    "Result",
    "Task",
    "Transform",
    "VerificationError",
    "analyze",
    "compile",
    "compress",
    "export",
    "load",
    "parse",
    "register",
    "save",
    "trace",
    "trace_islands",
]
