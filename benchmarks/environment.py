"""What a figure was measured with: versions and machine, for the JSON of every benchmark."""

from __future__ import annotations

import json
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_PACKAGES = (
    "fxcompress",
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "onnx",
    "onnxruntime",
    "openvino",
    "torch-pruning",
)


def environment() -> dict[str, Any]:
    """Versions, processor and threads."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": _processor(),
        "instructions": _instructions(),
        "cores": os.cpu_count(),
        "versions": versions,
    }


def write_results(name: str, rows: list[dict[str, Any]]) -> Path:
    """Writes ``results/NAME.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")
    return path


def of_processor(name: str) -> str:
    """Name of results that depend on the processor's integer instructions: one kind's do not replace the other's."""
    from fxcompress.passes.quantization.processor import has_vnni

    return f"{name}_vnni" if has_vnni() else name


def _instructions() -> list[str]:
    """What the processor has for integers: without VNNI or AMX int8 gains less."""
    wanted = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8")
    try:
        flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return []
    return [name for name in wanted if flags is not None and name in flags[1].split()]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
