"""The zip file under an artifact, read without ``torch.load``, ``pickle`` or ``torch.export.load``.

``torch.export.load`` falls back to unrestricted pickle for sample inputs and evaluates size expressions with sympy: a
file from elsewhere could run code. Here the manifest is JSON, and weights are raw bytes.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fxcompress.errors import ArtifactError, VerificationError

SUFFIX = ".pt2"
FORMAT = "fxcompress"
FORMAT_VERSION = 1
MANIFEST = "fxcompress.json"
"""Name of the manifest among the archive's extra files."""

_TENSORS = {"data/weights/": "model_weights_config.json", "data/constants/": "model_constants_config.json"}


class Archive:
    """An open artifact: its manifest, and the values of its tensors by name."""

    def __init__(self, path: Path, file: zipfile.ZipFile) -> None:
        self._path = path
        self._file = file
        self._root = file.namelist()[0].partition("/")[0] + "/"
        self._size = path.stat().st_size
        self.manifest = self._manifest()
        self._placed = self._placements()
        self._storages: dict[str, bytearray] = {}

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The values of a parameter or buffer, on the CPU."""
        folder, placed = self._placed[name]
        if placed["use_pickle"]:
            raise ArtifactError(
                f"{self._path}: the values of {name!r} are a pickle, which is never loaded; save it again"
            )
        meta = placed["tensor_meta"]
        member = folder + placed["path_name"]
        if member not in self._storages:
            self._storages[member] = self._bytes(member)
        raw = self._storages[member]
        sizes, strides = ([size["as_int"] for size in meta[key]] for key in ("sizes", "strides"))
        flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        return flat.as_strided(sizes, strides, meta["storage_offset"]["as_int"])

    def _manifest(self) -> dict[str, Any]:
        if min(info.header_offset for info in self._file.infolist()) > 0:
            raise zipfile.BadZipFile("only an archive inside it is whole")  # a file cut short, read from its end
        names = set(self._file.namelist())
        if f"{self._root}extra/{MANIFEST}" not in names:
            if f"{self._root}models/model.json" in names:
                raise ArtifactError(
                    f"{self._path} was written by torch.export, not by fxcompress; "
                    f"use fxcompress.trace(torch.export.load({str(self._path)!r}))"
                )
            raise ArtifactError(f"{self._path} is no fxcompress artifact; load what fxcompress.save wrote")
        manifest = json.loads(self._bytes(f"extra/{MANIFEST}"))
        if manifest["format"] != FORMAT:
            raise ArtifactError(f"{self._path} holds {manifest['format']!r}; load what fxcompress.save wrote")
        if manifest["version"] > FORMAT_VERSION:
            raise ArtifactError(
                f"{self._path} has format version {manifest['version']}, made by fxcompress {manifest['fxcompress']}; "
                f"this one reads up to {FORMAT_VERSION}. Upgrade fxcompress: pip install -U fxcompress"
            )
        return dict(manifest)

    def _placements(self) -> dict[str, tuple[str, Any]]:
        """Tensor name -> folder and torch's own entry for it."""
        return {
            name: (folder, entry)
            for folder, config in _TENSORS.items()
            for name, entry in json.loads(self._bytes(folder + config))["config"].items()
        }

    def _bytes(self, member: str) -> bytearray:
        info = self._file.getinfo(self._root + member)
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > self._size:
            raise ValueError(f"{member} is compressed")
        with self._file.open(info) as stream:
            return bytearray(stream.read())  # compares the checksum


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[Archive]:
    """Opens an artifact for reading.

    Raises:
        ArtifactError: The file is missing, is not ours, is damaged, or is of a newer format.
    """
    file = Path(path)
    check_suffix(file)
    if not file.is_file():
        raise ArtifactError(f"there is no file {file}; give the path of what fxcompress.save wrote")
    try:
        with zipfile.ZipFile(file) as archive:
            yield Archive(file, archive)
    except ArtifactError as error:
        raise error if str(file) in str(error) else ArtifactError(f"{file} cannot be loaded: {error}") from error
    except PermissionError as error:
        raise ArtifactError(f"{file} cannot be read: {error.strerror}; ask for permission to read it") from error
    except zipfile.BadZipFile as error:
        raise ArtifactError(
            f"{file} is corrupt, truncated or no .pt2 archive ({error}); copy or download it again"
        ) from error
    except (
        VerificationError,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        IndexError,
        RuntimeError,
        EOFError,
        OSError,
    ) as error:
        raise ArtifactError(f"{file} is damaged ({type(error).__name__}: {error}); copy or save it again") from error


def check_suffix(path: Path) -> None:
    """Raises :class:`ArtifactError` unless the name ends in ``.pt2``."""
    if path.suffix != SUFFIX:
        raise ArtifactError(f"{path} does not end in {SUFFIX}; name it {path.with_suffix(SUFFIX).name!r}")
