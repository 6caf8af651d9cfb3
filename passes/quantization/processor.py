"""What the processor of this machine has for integers."""

from __future__ import annotations

import torch

_INSTRUCTIONS = ("avx_vnni", "avx512_vnni", "amx_int8")
_WITHOUT = ("x86_64", "x86")
"""Architectures on which engines fall back to sums in 16 bits."""


def has_vnni() -> bool:
    """Whether products of 8-bit integers are added up in 32 bits by one instruction (VNNI, AMX, Arm's dot product)."""
    found = torch.cpu.get_capabilities()
    return found["architecture"] not in _WITHOUT or any(found.get(name) for name in _INSTRUCTIONS)
