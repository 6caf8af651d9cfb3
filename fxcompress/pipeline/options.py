"""The options of a pass: its dataclass fields, with the type, default and documentation of each."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import typing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fxcompress.errors import InputError
from fxcompress.pipeline.option_types import OptionType, option_type

if TYPE_CHECKING:
    from fxcompress.pass_base import Pass


@dataclass(frozen=True)
class Option:
    """One option of a pass class.

    Attributes:
        name: kebab-case name in pipeline text.
        attribute: Name of the dataclass field.
        type: How its values are read, frozen and written.
        default: Text of the default value, or ``None`` when a value must be given.
        doc: What the class's ``Attributes:`` section says about it.
    """

    name: str
    attribute: str
    type: OptionType
    default: str | None
    doc: str


@functools.cache
def options_of(cls: type[Pass]) -> tuple[Option, ...]:
    """The options that a pass class declares, in field order.

    A field's ``metadata={"unit": "MB"}`` names the unit its numbers are stored in.

    Raises:
        InputError: If a field's annotation has no form in pipeline text.
    """
    docs = _attribute_docs(cls)
    fields = [field for field in dataclasses.fields(cls) if field.init]
    hints = _hints(cls) if fields else {}
    return tuple(_option(cls, field, hints[field.name], docs.get(field.name, "")) for field in fields)


def freeze_options(instance: Pass) -> None:
    """Checks every option of a pass against its type and puts the hashable form (tuple, FrozenMapping) in place.

    Raises:
        InputError: If a value does not fit its option.
    """
    for option in options_of(type(instance)):
        try:
            value = option.type.accept(getattr(instance, option.attribute))
        except InputError as error:
            raise InputError(f"option {option.name!r} of {instance.name!r} {error}") from None
        object.__setattr__(instance, option.attribute, value)


def _hints(cls: type[Pass]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls)
    except NameError as error:
        raise InputError(
            f"an annotation of {cls.__qualname__} uses {error.name!r}, which {cls.__module__} does not import at run "
            "time; move that import out of 'if TYPE_CHECKING'"
        ) from None


def _option(cls: type[Pass], field: dataclasses.Field[Any], annotation: Any, doc: str) -> Option:
    name = field.name.replace("_", "-")
    try:
        kind = option_type(annotation, field.metadata.get("unit"))
        default = kind.write(kind.accept(_default(field))) if _has_default(field) else None
    except InputError as error:
        raise InputError(f"option {name!r} of {cls.__qualname__} {error}") from None
    return Option(name, field.name, kind, default, doc)


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


_DOC_ENTRY = re.compile(r" {4}(\w+)(?: \([^)]*\))?: (.+)")


def _attribute_docs(cls: type[Pass]) -> dict[str, str]:
    """Attribute name -> text, from the Google-style ``Attributes:`` section of a docstring."""
    lines = iter(inspect.cleandoc(cls.__doc__ or "").splitlines())
    docs: dict[str, str] = {}
    name = ""
    if not any(line == "Attributes:" for line in lines):
        return docs
    for line in lines:
        if line and not line.startswith("    "):
            break
        entry = _DOC_ENTRY.fullmatch(line)
        if entry:
            name, docs[entry[1]] = entry[1], entry[2]
        elif name and line:
            docs[name] += f" {line.strip()}"
    return docs
