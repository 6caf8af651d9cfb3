"""The types an option of a pass can have, read off its dataclass annotation.

Each type reads pipeline text, accepts (and freezes) values given in Python, and writes them back as text. To add one,
write an :class:`OptionType` and a row in ``_PLAIN`` or ``_GENERIC``.
"""

from __future__ import annotations

import math
import re
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any, ClassVar, Generic, Literal, TypeVar, Union, get_args, get_origin

from fxcompress.errors import InputError, PipelineError, did_you_mean
from fxcompress.pipeline.syntax import ListNode, Node, TableNode, Word, is_bare, parse_value, quote
from fxcompress.pipeline.units import units_like

K = TypeVar("K")
V = TypeVar("V")


class FrozenMapping(Mapping[K, V], Generic[K, V]):
    """A hashable mapping; two are equal when they hold the same items in the same order (first match may win)."""

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[K, V]) -> None:
        self._values = dict(values)

    def __getitem__(self, key: K) -> V:
        return self._values[key]

    def __iter__(self) -> Iterator[K]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(tuple(self._values.items()))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FrozenMapping):
            return NotImplemented
        return list(self._values.items()) == list(other._values.items())

    def __repr__(self) -> str:
        return f"FrozenMapping({self._values!r})"


class OptionType(ABC):
    """One type of option values.

    Attributes:
        label: What it is called in messages and documentation.
        words: The words it accepts, where they can be listed.
        rank: In a union, members of lower rank read first.
    """

    label: str
    words: tuple[str, ...] = ()
    rank: int

    def read_word(self, node: Word) -> Any:
        raise self.mismatch(node)

    def read_list(self, node: ListNode) -> Any:
        raise self.mismatch(node)

    def read_table(self, node: TableNode) -> Any:
        raise self.mismatch(node)

    def mismatch(self, node: Node) -> PipelineError:
        return node.error(
            f"expects {self.label}, not {node.shown}{did_you_mean(node.shown.strip(_QUOTES), self.words)}"
        )

    @abstractmethod
    def accept(self, value: Any) -> Any:
        """The frozen form of a value given in Python; raises :class:`InputError` if it does not fit."""

    @abstractmethod
    def write(self, value: Any) -> str:
        """The text that reads back as ``value``."""

    def refuse(self, value: Any) -> InputError:
        return InputError(f"expects {self.label}, not {value!r}")


_QUOTES = "'\""


class NoneType(OptionType):
    label, words, rank = "none", ("none",), 0

    def read_word(self, node: Word) -> None:
        if node.quoted or node.content != "none":
            raise self.mismatch(node)

    def accept(self, value: Any) -> None:
        if value is not None:
            raise self.refuse(value)

    def write(self, value: None) -> str:
        return "none"


class BoolType(OptionType):
    label, words, rank = "true or false", ("true", "false"), 1

    def read_word(self, node: Word) -> bool:
        if node.quoted or node.content not in self.words:
            raise self.mismatch(node)
        return node.content == "true"

    def accept(self, value: Any) -> bool:
        if not isinstance(value, bool):
            raise self.refuse(value)
        return value

    def write(self, value: bool) -> str:
        return "true" if value else "false"


class NumberType(OptionType):
    """An int or a float, perhaps in a unit; a number without one is in the declared unit.

    Args:
        python: ``int`` or ``float``.
        unit: The unit the value is stored in, or ``None``.
    """

    _PATTERN = re.compile(r"(?P<number>[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?)(?P<unit>.*)", re.DOTALL)
    _LABELS: ClassVar[Mapping[type, str]] = {int: "a whole number", float: "a number"}

    def __init__(self, python: type[int] | type[float], unit: str | None = None) -> None:
        self.python = python
        self.unit = unit
        self.units: Mapping[str, Fraction] = {} if unit is None else units_like(unit)
        self.rank = 2 if python is int else 3
        self.label = self._LABELS[python] + (f" with a unit such as {unit}" if unit else "")

    def read_word(self, node: Word) -> int | float:
        match = self._PATTERN.fullmatch(node.content)
        if match is None or node.quoted:
            raise self.mismatch(node)
        if match["unit"] and match["unit"] not in self.units:
            if not self.units:
                raise self.mismatch(node)
            known = ", ".join(self.units)
            raise node.error(f"expects a known unit, not {match['unit']!r}; known: {known}", match.start("unit"))
        try:
            return self._convert(match["number"], match["unit"])
        except (ValueError, OverflowError):
            raise self.mismatch(node) from None

    def _convert(self, number: str, unit: str) -> int | float:
        if self.python is int and not self.units:
            return int(number)
        if not unit or unit == self.unit:
            return self._whole(Fraction(number)) if self.python is int else self._finite(float(number))
        # Fractions keep 0.1GB at exactly 100MB.
        value = Fraction(number) * self.units[unit] / self.units[self.unit or unit]
        return self._whole(value) if self.python is int else self._finite(float(value))

    @staticmethod
    def _whole(value: Fraction) -> int:
        if value.denominator != 1:
            raise ValueError("not whole")
        return value.numerator

    @staticmethod
    def _finite(value: float) -> float:
        if not math.isfinite(value):
            raise OverflowError("too large")
        return value

    def accept(self, value: Any) -> int | float:
        if isinstance(value, bool) or not isinstance(value, (int, self.python)):
            raise self.refuse(value)
        try:
            return int(value) if self.python is int else self._finite(float(value))
        except OverflowError:
            raise self.refuse(value) from None

    def write(self, value: int | float) -> str:
        return f"{repr(value).removesuffix('.0')}{self.unit}" if self.unit else repr(value)


class ChoiceType(OptionType):
    rank = 4

    def __init__(self, *choices: Any) -> None:
        self.choices = {_PLAIN[type(choice)]().write(choice): choice for choice in choices}
        self.words = tuple(self.choices)
        self.label = f"one of {', '.join(self.words)}" if len(self.words) > 1 else self.words[0]

    def read_word(self, node: Word) -> Any:
        text = quote(node.content) if node.quoted and not is_bare(node.content) else node.content
        if text not in self.choices or (node.quoted and not isinstance(self.choices[text], str)):
            raise self.mismatch(node)
        return self.choices[text]

    def accept(self, value: Any) -> Any:
        if not any(type(choice) is type(value) and choice == value for choice in self.choices.values()):
            raise InputError(f"expects {self.label}, not {value!r}{did_you_mean(str(value), self.words)}")
        return value

    def write(self, value: Any) -> str:
        return _PLAIN[type(value)]().write(value)


class StringType(OptionType):
    label, rank = "text", 5

    def read_word(self, node: Word) -> str:
        return node.content

    def accept(self, value: Any) -> str:
        if not isinstance(value, str):
            raise self.refuse(value)
        return value

    def write(self, value: str) -> str:
        return value if is_bare(value) else quote(value)


class TupleType(OptionType):
    rank = 6

    def __init__(self, item: OptionType) -> None:
        self.item = item
        self.label = f"a list [...] of {item.label}"

    def read_list(self, node: ListNode) -> tuple[Any, ...]:
        return tuple(item.read_as(self.item) for item in node.items)

    def accept(self, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, (tuple, list)):
            raise self.refuse(value)
        return tuple(self.item.accept(item) for item in value)

    def write(self, value: tuple[Any, ...]) -> str:
        return f"[{' '.join(self.item.write(item) for item in value)}]"


class MappingType(OptionType):
    rank = 7

    def __init__(self, key: OptionType, item: OptionType) -> None:
        self.key = key
        self.item = item
        self.label = f"a table {{name:value ...}} of {item.label}"

    def read_table(self, node: TableNode) -> FrozenMapping[Any, Any]:
        return FrozenMapping({key.read_as(self.key): item.read_as(self.item) for key, item in node.entries})

    def accept(self, value: Any) -> FrozenMapping[Any, Any]:
        if not isinstance(value, Mapping):
            raise self.refuse(value)
        return FrozenMapping({self.key.accept(key): self.item.accept(item) for key, item in value.items()})

    def write(self, value: FrozenMapping[Any, Any]) -> str:
        return f"{{{' '.join(f'{self.key.write(key)}:{self.item.write(item)}' for key, item in value.items())}}}"


class UnionType(OptionType):
    """``A | B``: the first member that fits reads; strings that another member would read are quoted."""

    rank = 8

    def __init__(self, *members: OptionType) -> None:
        self.members = sorted(members, key=lambda member: member.rank)
        if len({member.rank for member in members}) < len(members):
            raise InputError("has two alternatives that text cannot tell apart; declare one of them")
        self.words = tuple(word for member in self.members for word in member.words)
        shown = [*self.members[1:], self.members[0]] if isinstance(self.members[0], NoneType) else self.members
        self.label = " or ".join(member.label for member in shown)

    def _read(self, node: Node) -> Any:
        faults = []
        for member in self.members:
            try:
                return node.read_as(member)
            except PipelineError as fault:
                faults.append(fault)
        deepest = max(faults, key=lambda fault: fault.position)
        raise deepest if deepest.position > node.position else self.mismatch(node)

    read_word = read_list = read_table = _read

    def accept(self, value: Any) -> Any:
        return self._accept(value)[1]

    def _accept(self, value: Any) -> tuple[OptionType, Any]:
        fitting: list[tuple[OptionType, Any]] = []
        for member in self.members:
            try:
                fitting.append((member, member.accept(value)))
            except InputError:
                continue
        if not fitting:
            raise self.refuse(value)
        return next((pair for pair in fitting if type(pair[1]) is type(value)), fitting[0])

    def write(self, value: Any) -> str:
        member, value = self._accept(value)
        text = member.write(value)
        back = parse_value(text).read_as(self)
        return text if (type(back), back) == (type(value), value) else quote(value)


_PLAIN: Mapping[Any, Callable[..., OptionType]] = {
    type(None): NoneType,
    bool: BoolType,
    int: lambda: NumberType(int),
    float: lambda: NumberType(float),
    str: StringType,
}


def _tuple_of(item: Any, *rest: Any, unit: str | None) -> OptionType:
    if rest != (...,):
        raise InputError("is a tuple of fixed length; declare tuple[X, ...]")
    return option_type(item, unit)


_GENERIC: Mapping[Any, Callable[[tuple[Any, ...], str | None], OptionType]] = {
    Literal: lambda arguments, unit: ChoiceType(*arguments),
    tuple: lambda arguments, unit: TupleType(_tuple_of(*arguments, unit=unit)),
    Mapping: lambda arguments, unit: MappingType(option_type(arguments[0]), option_type(arguments[1], unit)),
    Union: lambda arguments, unit: UnionType(*(option_type(argument, unit) for argument in arguments)),
    types.UnionType: lambda arguments, unit: UnionType(*(option_type(argument, unit) for argument in arguments)),
}


def option_type(annotation: Any, unit: str | None = None) -> OptionType:
    """The option type that an annotation declares; ``unit`` is given to the numbers in it.

    Raises:
        InputError: If pipeline text has no form for the annotation.
    """
    if unit is not None and annotation in (int, float):
        return NumberType(annotation, unit)
    if annotation in _PLAIN:
        return _PLAIN[annotation]()
    origin = get_origin(annotation)
    if origin in _GENERIC:
        return _GENERIC[origin](get_args(annotation), unit)
    raise InputError(
        f"has the type {annotation!r}, which pipeline text cannot write; use bool, int, float, str, Literal, None, "
        "tuple[X, ...], Mapping[K, V] or a union of these"
    )
