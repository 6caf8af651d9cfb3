"""Where passes are found by name: built-in ones, those of installed packages, and those registered in this process.

Nothing is imported until it is asked for. A package offers passes through the entry point group ``fxcompress.passes``:

    [project.entry-points."fxcompress.passes"]
    my-pass = "my_package.my_pass:MyPass"
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Literal, TypeVar, get_args

from fxcompress.errors import InputError, did_you_mean
from fxcompress.pass_base import Analysis, Guarantee, Pass, Transform, describe
from fxcompress.pipeline.options import Option, options_of

GROUP = "fxcompress.passes"

BUILT_IN: Mapping[str, str] = {
    "canonicalize-linear": "fxcompress.passes.canonicalize_linear:CanonicalizeLinear",
    "cast": "fxcompress.passes.cast:Cast",
    "channels": "fxcompress.passes.channels.analysis:Channels",
    "compensate": "fxcompress.passes.compensate:Compensate",
    "correct-bias": "fxcompress.passes.correct_bias:CorrectBias",
    "cost": "fxcompress.passes.cost:Cost",
    "eliminate-dead": "fxcompress.passes.eliminate_dead:EliminateDead",
    "equalize": "fxcompress.passes.equalize:Equalize",
    "fold-batchnorm": "fxcompress.passes.fold_batchnorm:FoldBatchnorm",
    "fold-constants": "fxcompress.passes.fold_constants:FoldConstants",
    "insert-qdq": "fxcompress.passes.insert_qdq:InsertQdq",
    "quantize-dynamic": "fxcompress.passes.quantize_dynamic:QuantizeDynamic",
    "quantize-weights": "fxcompress.passes.quantize_weights:QuantizeWeights",
    "ranges": "fxcompress.passes.ranges:Ranges",
    "reestimate-batchnorm": "fxcompress.passes.reestimate_batchnorm:ReestimateBatchnorm",
    "refine-rounding": "fxcompress.passes.refine_rounding:RefineRounding",
    "remove-channels": "fxcompress.passes.remove_channels:RemoveChannels",
    "select-channels": "fxcompress.passes.select_channels:SelectChannels",
    "train": "fxcompress.passes.train:Train",
}
"""Pass name -> module and class."""

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")

_registered: dict[str, type[Pass]] = {}

PassClass = TypeVar("PassClass", bound=type[Pass])


@dataclass(frozen=True)
class CatalogEntry:
    """What documentation and ``fxcompress passes`` show of a pass."""

    name: str
    kind: Literal["analysis", "transform"]
    summary: str
    options: tuple[Option, ...]


def names() -> list[str]:
    """The names of all passes, sorted; imports none of them.

    Raises:
        InputError: If two distributions offer the same name, or one offers a built-in name.
    """
    return sorted({*BUILT_IN, *_installed(), *_registered})


def get(name: str) -> type[Pass]:
    """The pass class of that name.

    Raises:
        InputError: If there is none (near names are given), or what an installed package offers is not a pass.
    """
    installed = _installed()
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        found: type[Pass] = getattr(importlib.import_module(module), attribute)
        return found
    if name in _registered:
        return _registered[name]
    if name in installed:
        return _load(installed[name])
    raise InputError(f"there is no pass {name!r}{did_you_mean(name, names())}; 'fxcompress passes' lists all")


def register(cls: PassClass) -> PassClass:
    """Makes a pass known by its name in this process; use as a decorator, above ``@dataclass(frozen=True)``.

    Defining the same class again (a notebook cell run twice) replaces it.

    Raises:
        InputError: If it is not a concrete pass, or the name is taken.
    """
    check_pass(cls, f"{getattr(cls, '__module__', '?')}.{getattr(cls, '__qualname__', cls)}")
    previous = _registered.get(cls.name)
    if previous is not None and _path(previous) != _path(cls):
        raise InputError(f"the pass name {cls.name!r} is taken by {_path(previous)}; rename {_path(cls)}")
    owner = f"built into fxcompress ({BUILT_IN[cls.name]})" if cls.name in BUILT_IN else None
    if owner is None and cls.name in _installed():
        owner = f"offered by the distribution {_distribution(_installed()[cls.name])!r}"
    if owner is not None:
        raise InputError(f"the pass name {cls.name!r} is {owner}; rename {_path(cls)}")
    _registered[cls.name] = cls
    return cls


def catalog() -> list[CatalogEntry]:
    """Every pass with its kind, summary and options, sorted by name; imports all of them."""
    return [_catalog_entry(get(name)) for name in names()]


def _catalog_entry(cls: type[Pass]) -> CatalogEntry:
    kind: Literal["analysis", "transform"] = "analysis" if issubclass(cls, Analysis) else "transform"
    return CatalogEntry(cls.name, kind, describe(cls), options_of(cls))


def _path(cls: type[Pass]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _distribution(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "?"


def _installed() -> Mapping[str, EntryPoint]:
    return _scan(tuple(sys.path))


@functools.cache
def _scan(path: tuple[str, ...]) -> Mapping[str, EntryPoint]:
    """Entry points by name; scanned again only when ``sys.path`` differs."""
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=GROUP):
        other = "fxcompress itself" if point.name in BUILT_IN else None
        if point.name in found:
            other = f"the distribution {_distribution(found[point.name])!r}"
        if other is not None:
            raise InputError(
                f"the pass name {point.name!r} is offered by the distribution {_distribution(point)!r} and by {other}; "
                f"uninstall one of them"
            )
        found[point.name] = point
    return found


def _load(point: EntryPoint) -> type[Pass]:
    where = f"{point.value} of the distribution {_distribution(point)!r}"
    try:
        cls = point.load()
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"the pass {point.name!r} cannot be loaded from {where}: {error}; update or remove it"
        ) from error
    check_pass(cls, where)
    if cls.name != point.name:
        raise InputError(f"{where} is offered as {point.name!r} but names itself {cls.name!r}; make the two agree")
    checked: type[Pass] = cls
    return checked


def check_pass(cls: object, where: str) -> None:
    """Raises :class:`InputError` unless ``cls`` is a complete pass class; ``where`` names it in the message."""
    if not (isinstance(cls, type) and issubclass(cls, Pass)):
        raise InputError(f"{where} is not a pass; derive it from fxcompress.Analysis or fxcompress.Transform")
    if inspect.isabstract(cls):
        missing = ", ".join(sorted(cls.__abstractmethods__))
        raise InputError(f"{where} is abstract; implement {missing}")
    if "__dataclass_fields__" not in vars(cls):
        raise InputError(f"{where} is not a dataclass; put @dataclass(frozen=True) right above the class")
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InputError(f"{where} has the name {name!r}; give the class a kebab-case 'name' such as 'fold-batchnorm'")
    if issubclass(cls, Transform) and getattr(cls, "guarantee", None) not in get_args(Guarantee):
        raise InputError(f"{where} does not say what it guarantees; set guarantee = 'exact' or 'lossy' on the class")
    options_of(cls)
