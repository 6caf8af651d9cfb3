"""Inductor: a model compiled by ``torch.compile``; quantized ones run oneDNN's integer kernels.

Inductor finds those kernels where it may fold weights into the code ("freezing") and knows the patterns of PT2E's x86
quantizer, which are in torchao.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from fxcompress.engines.export import TOLERANCES, is_near
from fxcompress.engines.installed import require
from fxcompress.engines.integers import is_quantized, without_quantization
from fxcompress.errors import ArtifactError, MissingExtraError, VerificationError
from fxcompress.ir.program import Interface
from fxcompress.tracing.untouched import seeded
from fxcompress.verification.numerics import compare_outputs, measure_outputs

_PATTERNS = "torchao.quantization.pt2e.quantizer.x86_inductor_quantizer"
"""Registers the patterns of integer kernels when it is imported."""


def compiled(module: fx.GraphModule, interface: Interface) -> Callable[..., Any]:
    """Compiles a module that is in eval mode, and compares it with the module on the example inputs.

    Raises:
        MissingExtraError: The model is quantized, and torchao is not installed.
        ArtifactError: Inductor cannot compile the model.
        VerificationError: It computes something else.
    """
    quantized = is_quantized(module)
    if quantized:
        _register_patterns()
    with _explained():
        function = torch.compile(module, backend="inductor")

    def call(*args: Any, **kwargs: Any) -> Any:
        with _explained(), torch.no_grad(), _freezing() if quantized else nullcontext():
            return function(*args, **kwargs)  # a new size compiles anew

    with seeded():
        found = call(*interface.args, **interface.kwargs)
    _check(module, interface, found)
    return call


def _register_patterns() -> None:
    purpose = "A quantized model in Inductor"
    require("torchao", "inductor", purpose)
    try:
        importlib.import_module(_PATTERNS)
    except ImportError as error:
        raise MissingExtraError("torchao", "inductor", purpose) from error


def _freezing() -> AbstractContextManager[Any]:
    from torch._inductor import config

    patched: AbstractContextManager[Any] = config.patch(freezing=True)
    return patched


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # those of dynamo, inductor and the C++ compiler share no base class
        reason = str(error).strip().partition("\n")[0]
        raise ArtifactError(
            f"inductor cannot compile or run the model: {type(error).__name__}: {reason}; "
            "install a C++ compiler such as g++, or choose another engine"
        ) from error


def _check(module: fx.GraphModule, interface: Interface, found: Any) -> None:
    """Raises :class:`VerificationError` where what was compiled is further from the model than its kernels may be."""

    def outputs(model: fx.GraphModule) -> list[Any]:
        with torch.no_grad(), seeded():
            return tree_leaves(model(*interface.args, **interface.kwargs))

    expected = outputs(module)
    compared = measure_outputs if is_quantized(module) else compare_outputs  # classes follow the kernels' rounding
    error = compared(expected, tree_leaves(found))
    dtypes = {tensor.dtype for tensor in (*module.parameters(), *module.buffers(), *expected) if _is_real(tensor)}
    if error.max_rel_error <= max((TOLERANCES[dtype] for dtype in dtypes if dtype in TOLERANCES), default=0.0):
        return
    said = f"what inductor compiled differs from the model by {error.max_rel_error:.2e} of its largest value"
    if not is_quantized(module):
        raise VerificationError(f"{said}; choose another engine, and report it")
    noise = measure_outputs(outputs(without_quantization(module)), expected)
    if not is_near(error, noise):
        raise VerificationError(
            f"{said}, an SQNR of {error.sqnr_db:.1f} dB where the model's own quantization has {noise.sqnr_db:.1f} dB; "
            "quantize with insert-qdq{target=x86}, or choose another engine"
        )


def _is_real(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()
