"""The layering of the code: who may import whom, and what no file does."""

import ast
import inspect
from pathlib import Path

import pytest

from fxcompress import errors

ROOT = Path(__file__).parents[2]
MACHINE = sorted((ROOT / "fxcompress").rglob("*.py"))
KNOWLEDGE = sorted((ROOT / "passes").rglob("*.py"))
AROUND = sorted([*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])


def relative(path):
    return str(path.relative_to(ROOT))


def imports(path):
    """Modules that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def calls(path):
    """Names that a file calls as plain functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node.func.id


def test_there_is_something_to_look_at():
    assert len(MACHINE) > 40
    assert len(KNOWLEDGE) > 3


@pytest.mark.parametrize("path", MACHINE, ids=relative)
def test_the_machine_does_not_import_passes(path):
    assert not [name for name in imports(path) if name.split(".")[:2] == ["fxcompress", "passes"]]


@pytest.mark.parametrize("path", MACHINE + KNOWLEDGE, ids=relative)
def test_every_file(path):
    assert not [name for name in imports(path) if name.split(".")[0] in ("passes", "pickle")]
    assert not {"print", "eval", "exec"} & set(calls(path))


@pytest.mark.parametrize("path", MACHINE + KNOWLEDGE + AROUND, ids=relative)
def test_every_file_has_one_subject(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    assert path.name != "utils.py"


def test_passes_are_short():
    lengths = sorted(len(path.read_text(encoding="utf-8").splitlines()) for path in KNOWLEDGE)
    assert lengths[len(lengths) // 2] <= 150


def test_one_root_of_all_errors_with_at_most_five_children():
    classes = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if cls.__module__ == errors.__name__]
    assert all(issubclass(cls, errors.FxCompressError) for cls in classes)
    assert len(errors.FxCompressError.__subclasses__()) <= 5
