"""Pipelines: ordered passes and their text form.

    fold-batchnorm,select-channels{ratio=0.5 criterion=taylor},remove-channels

Options are separated by spaces and named in kebab-case; lists are ``[a b]``, tables ``{layer4.*:0.3 fc:0.1}``, strings
that need it are quoted as in JSON, numbers may carry a unit (``512MB``). ``parse(str(p)) == p`` for every pipeline of
passes found by name; ``str`` leaves out options that have their default value.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fxcompress import registry
from fxcompress.errors import InputError, PipelineError, did_you_mean
from fxcompress.pass_base import Pass
from fxcompress.pipeline.options import Option, options_of
from fxcompress.pipeline.syntax import Node, PassNode, Word, parse_syntax


@dataclass(frozen=True)
class Pipeline:
    """One pass or more, in the order they run.

    Raises:
        InputError: If it is empty or holds something that is not a pass.
    """

    passes: tuple[Pass, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "passes", tuple(self.passes))
        if not self.passes:
            raise InputError("the pipeline is empty; name at least one pass")
        items: tuple[Any, ...] = self.passes  # callers without a type checker may hand in anything
        for index, item in enumerate(items):
            if not isinstance(item, Pass):
                remedy = (
                    f"make an instance: {item.__name__}()" if isinstance(item, type) else "give instances of passes"
                )
                raise InputError(f"item {index} of the pipeline is {item!r}, which is not a pass; {remedy}")
            registry.check_pass(type(item), type(item).__qualname__)

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    def __len__(self) -> int:
        return len(self.passes)

    def __getitem__(self, index: int) -> Pass:
        return self.passes[index]

    def __str__(self) -> str:
        return ",".join(map(pass_text, self.passes))


def parse(text: str) -> Pipeline:
    """The pipeline that a text describes.

    Raises:
        PipelineError: If the text is wrong; it points at the offending character and gives near names.
    """
    if not isinstance(text, str):
        raise InputError(f"pipeline text must be a string, not {text!r}")
    return Pipeline(tuple(_build(node) for node in parse_syntax(text)))


def as_pipeline(pipeline: str | Pipeline | Sequence[Pass]) -> Pipeline:
    """A pipeline from text, from passes, or as it is.

    Raises:
        InputError: If it is none of these, or wrong.
    """
    given: Any = pipeline
    if isinstance(given, Pipeline):
        return given
    if isinstance(given, str):
        return parse(given)
    if isinstance(given, (Pass, type)) or not isinstance(given, Iterable):
        remedy = "put it in a list" if isinstance(given, (Pass, type)) else "give pipeline text or a list of passes"
        raise InputError(f"{given!r} is no pipeline; {remedy}")
    return Pipeline(tuple(given))


def pass_text(item: Pass) -> str:
    """A pass as pipeline text, with the options that differ from their defaults."""
    options = options_of(type(item))
    written = [(option, option.type.write(getattr(item, option.attribute))) for option in options]
    given = [f"{option.name}={text}" for option, text in written if text != option.default]
    return f"{item.name}{{{' '.join(given)}}}" if given else item.name


def _build(node: PassNode) -> Pass:
    cls = _find(node.name)
    options = {option.name: option for option in options_of(cls)}
    values = {name.content: _read(cls, options, name, value) for name, value in node.options}
    missing = [name for name, option in options.items() if option.default is None and name not in values]
    if missing:
        raise node.name.error(f"{cls.name!r} needs the option {missing[0]!r}: {cls.name}{{{missing[0]}=...}}")
    try:
        return cls(**{options[name].attribute: value for name, value in values.items()})
    except InputError as error:
        # A range check of the class does not say where it looked; with one option there is no doubt.
        culprit: Node = node.options[0][1] if len(node.options) == 1 else node.name
        raise culprit.error(str(error)) from error


def _find(name: Word) -> type[Pass]:
    known = registry.names()
    if name.content not in known:
        raise name.error(f"unknown pass {name.content!r}{did_you_mean(name.content, known)}")
    return registry.get(name.content)


def _read(cls: type[Pass], options: dict[str, Option], name: Word, value: Node) -> Any:
    if name.content not in options:
        near = did_you_mean(name.content, options)
        known = f"its options: {', '.join(options)}" if options else "it has none"
        raise name.error(f"{cls.name!r} has no option {name.content!r}{near or f'; {known}'}")
    try:
        return value.read_as(options[name.content].type)
    except PipelineError as error:
        reason = f"option {name.content!r} of {cls.name!r} {error.reason}"
        raise PipelineError(error.text, error.position, reason) from None
