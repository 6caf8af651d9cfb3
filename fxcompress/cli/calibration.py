"""Calibration batches from a file of numpy arrays, each of which has a sample a row."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fxcompress.errors import InputError

BATCH = 16
"""Rows of a batch."""

FORMS = ".npy with the samples of a model's first input, or .npz with those of each input by its name"


def calibration_batches(path: str) -> list[Any]:
    """Batches for :class:`fxcompress.Task`; what runs when Python objects are unpickled is not read.

    Args:
        path: A ``.npy`` file, whose batches are tensors, or a ``.npz`` file, whose batches are dicts of tensors.

    Raises:
        InputError: The file is missing, holds something else, or its arrays have no rows or different numbers of them.
    """
    try:
        found = np.load(Path(path), allow_pickle=False)
        arrays = {"": found} if isinstance(found, np.ndarray) else dict(found)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"cannot read calibration samples from {path}: {error}; give {FORMS}") from error
    rows = {tensor.shape[0] if tensor.dim() else 0 for tensor in tensors.values()}
    if len(rows) != 1 or 0 in rows:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}".strip() for name, tensor in tensors.items()) or "none"
        raise InputError(f"the arrays in {path} ({shapes}) do not have as many samples each, and one at least")
    parts = {name: torch.split(tensor, BATCH) for name, tensor in tensors.items()}
    if "" in parts:
        return list(parts[""])
    return [dict(zip(parts, batch, strict=True)) for batch in zip(*parts.values(), strict=True)]
