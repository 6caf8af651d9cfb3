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


def blocks():
    text = README.read_text(encoding="utf-8")
    found = BLOCK.findall(text)
    assert len(found) == text.count("```python")
    return found


@pytest.mark.parametrize("index", range(len(blocks())))
def test_every_python_block_prints_what_it_shows(index, tmp_path):
    pytest.importorskip("torchvision", reason="the blocks compress torchvision models")
    code, shown = blocks()[index]
    assert len(code.splitlines()) <= 30
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    if writing():
        text = README.read_text(encoding="utf-8")
        old = text[text.index(code) :]
        README.write_text(text.replace(old, old.replace(shown, run.stdout, 1)), encoding="utf-8")
        shown = run.stdout
    assert without_durations(run.stdout) == without_durations(shown)
    assert {path.name for path in tmp_path.iterdir()} == set(re.findall(r"\(\"([\w.]+\.(?:pt2|html))\"\)", code))
