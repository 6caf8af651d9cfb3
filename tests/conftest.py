"""Fixtures for all tests."""

import os
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def golden():
    """Compares a text with ``tests/golden/NAME.txt``, exactly; ``FXCOMPRESS_GOLDEN=write`` writes the file instead."""

    def check(name, text):
        path = GOLDEN / f"{name}.txt"
        if os.environ.get("FXCOMPRESS_GOLDEN") == "write":
            path.write_text(text, encoding="utf-8")
        assert text == path.read_text(encoding="utf-8"), f"{path.name} differs; FXCOMPRESS_GOLDEN=write writes it anew"

    return check
