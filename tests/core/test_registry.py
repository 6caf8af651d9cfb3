"""Passes are found by name: built in, from installed packages, or registered in the process; clashes are errors."""

import importlib
import importlib.metadata
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
from toys import CountNodes, Scale

from fxcompress import registry
from fxcompress.errors import InputError
from fxcompress.pass_base import Analysis, Transform

PLUGIN = '''
from dataclasses import dataclass
from typing import ClassVar
from fxcompress.pass_base import Analysis

@dataclass(frozen=True)
class Plugged(Analysis[int]):
    """From a plugin."""
    name: ClassVar[str] = "plugged"
    def run(self, program, task):
        return 1

NOT_A_PASS = 3
'''


@pytest.fixture(autouse=True)
def empty_registrations(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a distribution that offers entry points of the group, as pip would lay it out."""

    def install(distribution: str, **points: str) -> None:
        site = tmp_path / distribution
        info = site / f"{distribution}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        lines = "".join(f"{name.replace('_', '-')} = {target}\n" for name, target in points.items())
        (info / "entry_points.txt").write_text(f"[fxcompress.passes]\n{lines}")
        (site / f"{distribution}_code.py").write_text(PLUGIN)
        monkeypatch.syspath_prepend(site)

    yield install
    for module in [name for name in sys.modules if name.endswith("_code")]:
        del sys.modules[module]


def test_names_are_sorted_and_hold_the_built_in_passes():
    names = registry.names()
    assert names == sorted(names)
    assert set(registry.BUILT_IN) <= set(names)


def test_names_imports_no_pass(install, monkeypatch):
    install("plug", plugged="plug_code:Plugged")

    def refuse(*args):
        raise AssertionError("a pass was imported")

    monkeypatch.setattr(importlib, "import_module", refuse)
    monkeypatch.setattr(importlib.metadata.EntryPoint, "load", refuse)
    assert "plugged" in registry.names()


@pytest.mark.parametrize("name", registry.BUILT_IN)
def test_built_in_rows_name_a_pass_of_that_name(name):
    assert registry.get(name).name == name


def test_unknown_names_give_near_ones():
    with pytest.raises(InputError) as caught:
        registry.get("fold-batchnrom")
    assert "there is no pass 'fold-batchnrom'; did you mean 'fold-batchnorm'" in str(caught.value)


def test_a_registered_pass_is_found_and_may_be_defined_again():
    assert registry.register(Scale) is Scale
    assert registry.get("scale") is Scale
    again = type("Scale", (Scale,), {"__module__": Scale.__module__, "__qualname__": Scale.__qualname__})
    again = dataclass(frozen=True)(again)
    registry.register(again)
    assert registry.get("scale") is again


def test_registering_a_taken_name_names_both():
    @dataclass(frozen=True)
    class Other(Analysis[int]):
        name: ClassVar[str] = "count-nodes"

        def run(self, program, task):
            return 0

    registry.register(CountNodes)
    with pytest.raises(InputError, match=r"'count-nodes' is taken by toys\.CountNodes; rename .*Other"):
        registry.register(Other)
    assert registry.get("count-nodes") is CountNodes


def test_registering_a_built_in_name_is_an_error():
    @dataclass(frozen=True)
    class Mine(CountNodes):
        name: ClassVar[str] = "fold-batchnorm"

    with pytest.raises(InputError, match=r"'fold-batchnorm' is built into fxcompress .*rename .*Mine"):
        registry.register(Mine)


def _undecorated() -> type:
    class Undecorated(CountNodes):
        name: ClassVar[str] = "undecorated"
        depth: int = 3

    return Undecorated


def _abstract() -> type:
    @dataclass(frozen=True)
    class Abstract(Transform):
        name: ClassVar[str] = "abstract"

    return Abstract


def _named(name: str) -> type:
    return dataclass(frozen=True)(type("Named", (CountNodes,), {"name": name}))


def _unguaranteed() -> type:
    @dataclass(frozen=True)
    class Unguaranteed(Transform):
        name: ClassVar[str] = "unguaranteed"

        def run(self, program, task):
            raise NotImplementedError

    return Unguaranteed


def _untypable() -> type:
    @dataclass(frozen=True)
    class Untypable(CountNodes):
        name: ClassVar[str] = "untypable"
        options: set[int] | None = None

    return Untypable


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (int, "builtins.int is not a pass; derive it from"),
        (_abstract(), "is abstract; implement run"),
        (_named("CamelCase"), "has the name 'CamelCase'; give the class a kebab-case 'name'"),
        (_undecorated(), r"is not a dataclass; put @dataclass\(frozen=True\)"),
        (_unguaranteed(), "does not say what it guarantees; set guarantee = 'exact' or 'lossy'"),
        (_untypable(), r"option 'options' of .*Untypable has the type set\[int\], which pipeline text cannot write"),
    ],
)
def test_what_is_not_a_complete_pass_is_refused(cls, message):
    with pytest.raises(InputError, match=message):
        registry.register(cls)


def test_an_installed_pass_is_found_without_registration(install):
    install("plug", plugged="plug_code:Plugged")
    assert "plugged" in registry.names()
    assert "plug_code" not in sys.modules
    assert registry.get("plugged") is importlib.import_module("plug_code").Plugged


def test_a_clash_with_a_built_in_pass_names_both(install):
    install("plug", cost="plug_code:Plugged")
    with pytest.raises(InputError, match="'cost' is offered by the distribution 'plug' and by fxcompress itself"):
        registry.names()


def test_a_clash_between_distributions_names_both(install):
    install("plug", plugged="plug_code:Plugged")
    install("grip", plugged="grip_code:Plugged")
    with pytest.raises(InputError) as caught:
        registry.get("plugged")
    assert "'plug'" in str(caught.value)
    assert "'grip'" in str(caught.value)


def test_registering_the_name_of_an_installed_pass_is_an_error(install):
    install("plug", count_nodes="plug_code:Plugged")
    with pytest.raises(InputError, match=r"'count-nodes' is offered by the distribution 'plug'; rename toys\.Count"):
        registry.register(CountNodes)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("plug_code:NOT_A_PASS", "plug_code:NOT_A_PASS of the distribution 'plug' is not a pass"),
        ("plug_code:Missing", "cannot be loaded from plug_code:Missing of the distribution 'plug'"),
        ("plug_gone:Plugged", "cannot be loaded from plug_gone:Plugged of the distribution 'plug'"),
        ("plug_code:Plugged", "is offered as 'other-name' but names itself 'plugged'; make the two agree"),
    ],
)
def test_an_entry_point_that_does_not_hold_what_it_says(install, target, message):
    install("plug", other_name=target)
    with pytest.raises(InputError, match=message):
        registry.get("other-name")


def test_catalog_describes_passes_and_options(monkeypatch):
    monkeypatch.setattr(registry, "BUILT_IN", {})
    registry.register(Scale)
    registry.register(CountNodes)
    count, scale = registry.catalog()
    assert (count.name, count.kind, count.summary, count.options) == ("count-nodes", "analysis", "Counts nodes.", ())
    assert (scale.name, scale.kind, scale.summary) == ("scale", "transform", "Multiplies a weight.")
    assert [(o.name, o.type.label, o.default, o.doc) for o in scale.options] == [
        ("factor", "a number", "2.0", "What it is multiplied with; 1 leaves it as it is."),
        ("names", "a list [...] of text", "[0.weight]", "The weights."),
    ]
