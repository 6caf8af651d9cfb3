r"""The grammar of pipeline text, without any knowledge of passes: text to nodes that know where they stood.

    pipeline = pass { "," pass }
    pass     = word [ "{" { word "=" value } "}" ]
    value    = word | string | "[" { value } "]" | "{" { (word | string) ":" value } "}"

A word is a run of characters other than white space and ``{}[]=:,"'\``; a string is written as in JSON. White space
separates and otherwise means nothing.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

from fxcompress.errors import PipelineError

_WORD = r"""[^\s{}\[\]=:,"'\\]+"""
_TOKEN = re.compile(rf"""\s*(?:(?P<word>{_WORD})|(?P<string>"(?:[^"\\]|\\.)*")|(?P<mark>[{{}}\[\]=:,]))""", re.DOTALL)
_DEEPEST = 16
_CLOSING = {"{": "}", "[": "]"}


class Reader(Protocol):
    """What turns a value node into a typed value; see :mod:`fxcompress.pipeline.option_types`."""

    def read_word(self, node: Word) -> Any: ...
    def read_list(self, node: ListNode) -> Any: ...
    def read_table(self, node: TableNode) -> Any: ...


@dataclass(frozen=True)
class Node(ABC):
    """A piece of pipeline text.

    Attributes:
        text: The whole pipeline text.
        position: Offset of the piece's first character.
    """

    text: str
    position: int

    def error(self, reason: str, offset: int = 0) -> PipelineError:
        """An error that points at this piece, ``offset`` characters into it."""
        return PipelineError(self.text, self.position + offset, reason)

    @abstractmethod
    def read_as(self, reader: Reader) -> Any:
        """The value that ``reader`` sees in this piece."""

    @property
    @abstractmethod
    def shown(self) -> str:
        """The piece as an error message names it."""


@dataclass(frozen=True)
class Word(Node):
    """A bare word or a quoted string."""

    content: str
    quoted: bool

    def read_as(self, reader: Reader) -> Any:
        return reader.read_word(self)

    @property
    def shown(self) -> str:
        return f'"{self.content}"' if self.quoted else repr(self.content)


@dataclass(frozen=True)
class ListNode(Node):
    """``[a b c]``."""

    items: tuple[Node, ...]

    def read_as(self, reader: Reader) -> Any:
        return reader.read_list(self)

    @property
    def shown(self) -> str:
        return "a list [...]"


@dataclass(frozen=True)
class TableNode(Node):
    """``{key:value key:value}``."""

    entries: tuple[tuple[Word, Node], ...]

    def read_as(self, reader: Reader) -> Any:
        return reader.read_table(self)

    @property
    def shown(self) -> str:
        return "a table {...}"


@dataclass(frozen=True)
class PassNode:
    """A pass's name and its options in the order given."""

    name: Word
    options: tuple[tuple[Word, Node], ...]


@dataclass(frozen=True)
class _Token:
    kind: str
    content: str
    position: int


def is_bare(content: str) -> bool:
    """Whether a string can stand in pipeline text without quotes."""
    return re.fullmatch(_WORD, content) is not None and content.isprintable()


def quote(content: str) -> str:
    """A string as pipeline text writes it when it needs quotes."""
    return json.dumps(content, ensure_ascii=False)


def parse_syntax(text: str) -> tuple[PassNode, ...]:
    """The passes named in a pipeline text; raises :class:`PipelineError` where the grammar is broken."""
    return _Parser(text).pipeline()


def parse_value(text: str) -> Node:
    """One option value on its own."""
    return _Parser(text).value("a value")


def _tokens(text: str) -> list[_Token]:
    tokens: list[_Token] = []
    position, end = 0, len(text.rstrip())
    while position < end:
        match = _TOKEN.match(text, position)
        if match is None:
            raise _stray(text, position)
        kind = str(match.lastgroup)
        start = match.start(kind)
        if tokens and start == match.start() and "mark" not in (kind, tokens[-1].kind):
            raise PipelineError(text, start, "put a space between two values")
        tokens.append(_Token(kind, match[kind], start))
        position = match.end()
    return [*tokens, _Token("end", "", end)]


def _stray(text: str, position: int) -> PipelineError:
    position += len(text[position:]) - len(text[position:].lstrip())
    if text[position] == '"':
        return PipelineError(text, position, "this string is not closed; add a '\"' at its end")
    return PipelineError(text, position, f'{text[position]!r} can stand only inside a "quoted" string')


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = _tokens(text)
        self.index = 0
        self.depth = 0

    @property
    def next(self) -> _Token:
        return self.tokens[self.index]

    def take(self) -> _Token:
        token = self.next
        self.index += token.kind != "end"
        return token

    def at(self, mark: str) -> bool:
        return self.next.kind == "mark" and self.next.content == mark

    def error(self, reason: str) -> PipelineError:
        return PipelineError(self.text, self.next.position, reason)

    def pipeline(self) -> tuple[PassNode, ...]:
        if self.next.kind == "end":
            raise self.error("the pipeline is empty; name at least one pass")
        passes = [self.one_pass()]
        while self.next.kind != "end":
            if not self.at(","):
                stray = f"{self.next.content!r} closes nothing" if self.next.content in "}]" else "expected ','"
                raise self.error(f"{stray}; passes are written name{{option=value option=value}} with ',' between them")
            comma = self.take()
            if self.next.kind == "end":
                raise PipelineError(self.text, comma.position, "trailing comma; remove it or name a pass after it")
            passes.append(self.one_pass())
        return tuple(passes)

    def one_pass(self) -> PassNode:
        name = self.word("a pass name")
        return PassNode(name, tuple(self.pairs("=", "an option name")) if self.at("{") else ())

    def word(self, what: str) -> Word:
        if self.next.kind != "word":
            raise self.error(f"expected {what}{self.found()}")
        token = self.take()
        return Word(self.text, token.position, token.content, quoted=False)

    def found(self) -> str:
        return ", but the text ends" if self.next.kind == "end" else f", not {self.next.content!r}"

    def key(self, what: str) -> Word:
        if self.next.kind != "string":
            return self.word(what)
        token = self.take()
        return Word(self.text, token.position, self.unquoted(token), quoted=True)

    def unquoted(self, token: _Token) -> str:
        try:
            return str(json.loads(token.content, strict=False))
        except json.JSONDecodeError as error:
            raise PipelineError(
                self.text, token.position + error.pos, 'not a JSON escape; write "\\\\" for a backslash'
            ) from None

    def value(self, what: str) -> Node:
        if self.depth == _DEEPEST:
            raise self.error(f"more than {_DEEPEST} lists and tables inside each other; no option takes that")
        position = self.next.position
        self.depth += 1
        node: Node
        if self.at("["):
            node = ListNode(self.text, position, tuple(self.items()))
        elif self.at("{"):
            node = TableNode(self.text, position, tuple(self.pairs(":", "a key")))
        else:
            node = self.key(what)
        self.depth -= 1
        return node

    def items(self) -> list[Node]:
        opening = self.take()
        items = []
        while not self.closes(opening):
            items.append(self.value("a value"))
        return items

    def pairs(self, mark: str, what: str) -> list[tuple[Word, Node]]:
        opening = self.take()
        pairs: list[tuple[Word, Node]] = []
        while not self.closes(opening):
            key = self.word(what) if mark == "=" else self.key(what)
            if any(key.content == other.content for other, _ in pairs):
                raise key.error(f"{key.content!r} is given twice; keep one")
            if not self.at(mark):
                raise self.error(f"{key.content!r} needs a value: write {key.content}{mark}value")
            self.take()
            pairs.append((key, self.value(f"a value for {key.content!r}")))
        return pairs

    def closes(self, opening: _Token) -> bool:
        closing = _CLOSING[opening.content]
        if self.next.kind == "end":
            raise PipelineError(self.text, opening.position, f"{opening.content!r} is not closed; add {closing!r}")
        if self.at(","):
            raise self.error(f"inside {opening.content}{closing} separate with spaces, not commas")
        if self.at(closing):
            self.take()
            return True
        return False
