"""Files appear whole or not at all: they are written and checked beside their place, then moved there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fxcompress.errors import ArtifactError


@contextmanager
def staged(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a path to write to; what lies there (and beside it) is moved to ``path`` when the block ends well.

    After an error or Ctrl-C nothing is left behind and a file that was at ``path`` before is as it was.

    Raises:
        ArtifactError: The directory does not exist, is not writable, or ``path`` is a directory.
    """
    target = Path(path)
    parent = target.parent
    if not parent.is_dir():
        raise ArtifactError(f"cannot write {target}: the directory {parent} does not exist; create it first")
    if target.is_dir():
        raise ArtifactError(f"cannot write {target}: it is a directory; give the name of a file")
    try:
        folder = tempfile.TemporaryDirectory(dir=parent, prefix=f".{target.name}.")
    except OSError as error:
        raise ArtifactError(
            f"cannot write {target}: {error.strerror}; choose a directory that you may write to"
        ) from error
    with folder as name:
        staging = Path(name)
        try:
            yield staging / target.name
            made = sorted(staging.iterdir(), key=lambda file: file.name == target.name)  # the named file last
            for file in made:
                os.replace(file, parent / file.name)
        except OSError as error:
            raise ArtifactError(
                f"cannot write {target}: {error.strerror or error}; free some space or choose another directory"
            ) from error
