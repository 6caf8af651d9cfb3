"""The folder that a command leaves its files in: known to be writable before long work, filled only after it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fxcompress.errors import ArtifactError


@contextmanager
def output_folder(path: str | Path) -> Iterator[Path]:
    """Gives a folder to write files into, which move to ``path`` when the block ends well.

    After an error or Ctrl-C, files that were at ``path`` are as they were, and a folder that was not there is not.

    Raises:
        ArtifactError: If ``path`` is no folder, cannot be made, or cannot be written to.
    """
    target = Path(path)
    made = [folder for folder in (target, *target.parents) if not folder.exists()]
    try:
        try:
            target.mkdir(parents=True, exist_ok=True)
            staging = tempfile.TemporaryDirectory(dir=target, prefix=".fxcompress-", ignore_cleanup_errors=True)
        except OSError as error:
            raise _unwritable(target, error) from error
        with staging as name:
            yield Path(name)
            _move(Path(name), target)
    finally:
        with suppress(OSError):  # not empty: it holds the files
            for folder in made:
                folder.rmdir()


def _move(source: Path, target: Path) -> None:
    try:
        for file in sorted(source.iterdir()):
            os.replace(file, target / file.name)
    except OSError as error:
        raise _unwritable(target, error) from error


def _unwritable(target: Path, error: OSError) -> ArtifactError:
    return ArtifactError(f"cannot write into {target}: {error.strerror}; choose another folder with -o")
