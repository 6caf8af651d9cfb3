"""Imported once, before models are forked from the process that did: what the first export and removal set up.

The ONNX exporter's registry, the decomposition tables and the rules of every pass take longer than many a model.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import torch
from torch import nn

import fxcompress as fxc


def warm() -> None:
    """One small model through everything that coverage does."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    program = fxc.trace(model.eval(), torch.randn(2, 3, 8, 8))
    slim = fxc.PassManager("select-channels{ratio=0.5},remove-channels").run(program).program
    with tempfile.TemporaryDirectory() as folder:
        for name in ("warm.onnx", "warm.pt2"):
            fxc.export(slim, Path(folder) / name)


with warnings.catch_warnings(action="ignore"):
    warm()
