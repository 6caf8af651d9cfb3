"""README.md tells the truth: its blocks run and print what it shows, its tables are the registries'."""

import os
import re
import subprocess
import sys

import pytest
from readme_tables import README, rendered

BLOCK = re.compile(r"```python\n(.*?)```\s*prints\s*```text\n(.*?)```", re.DOTALL)


def without_durations(text):
    return re.sub(r"\d+(\.\d+)? m?s\b", "TIME", text)


def writing():
    return os.environ.get("FXCOMPRESS_GOLDEN") == "write"


def test_tables_are_made_from_the_registries_and_results():
    text = README.read_text(encoding="utf-8")
    if writing():
        README.write_text(rendered(text), encoding="utf-8")
    assert README.read_text(encoding="utf-8") == rendered(text)


def test_every_python_block_says_what_it_prints():
    text = README.read_text(encoding="utf-8")
    assert len(BLOCK.findall(text)) == text.count("```python") == 1


def test_the_quickstart_prints_what_it_shows(tmp_path):
    pytest.importorskip("torchvision", reason="the quickstart compresses a torchvision model")
    text = README.read_text(encoding="utf-8")
    ((code, shown),) = BLOCK.findall(text)
    assert len(code.splitlines()) <= 30
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    if writing():
        README.write_text(text.replace(f"```text\n{shown}```", f"```text\n{run.stdout}```"), encoding="utf-8")
        shown = run.stdout
    assert without_durations(run.stdout) == without_durations(shown)
    assert (tmp_path / "resnet18.pt2").exists()
    assert "<html" in (tmp_path / "resnet18.html").read_text(encoding="utf-8")
