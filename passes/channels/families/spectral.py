"""Fourier transforms, and complex numbers made of their parts."""

from __future__ import annotations

import torch
from fxcompress.passes.channels.layout import Layout, position
from fxcompress.passes.channels.rules import Call, normalized_dim, pointwise, replaced, rule

aten = torch.ops.aten

rule(aten.real.default, aten.imag.default, aten.complex.default, aten.polar.default, aten.angle.default)(pointwise)


@rule(aten.fft_fft.default, aten.fft_ifft.default, aten.fft_rfft.default, aten.fft_irfft.default,
      aten.fft_hfft.default, aten.fft_ihfft.default, aten.fft_fft2.default, aten.fft_ifft2.default,
      aten.fft_rfft2.default, aten.fft_irfft2.default, aten.fft_fftn.default, aten.fft_ifftn.default,
      aten.fft_rfftn.default, aten.fft_irfftn.default, aten.fft_fftshift.default,
      aten.fft_ifftshift.default)  # fmt: skip
def transform(call: Call) -> Layout:
    """Every frequency depends on all elements of the transformed dims, which stay."""
    x = call.layout("self")
    given = call["dim"]
    listed = range(len(x)) if given is None else given if isinstance(given, (list, tuple)) else [given]
    dims = [normalized_dim(dim, len(x)) for dim in listed]
    call.keep(*(x[dim] for dim in dims))
    return replaced(x, {dim: position(call.shape[dim]) for dim in dims})
