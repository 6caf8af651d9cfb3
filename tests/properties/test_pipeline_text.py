"""Any pipeline survives being written and read; any text is a pipeline or an error that points into it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxcompress import registry
from fxcompress.errors import PipelineError
from fxcompress.pass_base import Analysis
from fxcompress.pipeline.text import Pipeline, parse


@dataclass(frozen=True)
class Every(Analysis[int]):
    """Has an option of every type, and the unions that are hard to tell apart."""

    name: ClassVar[str] = "every"
    flag: bool = False
    count: int = 1
    ratio: float = 0.5
    title: str = ""
    choice: Literal["a", "b c", "none"] = "a"
    bits: Literal[4, 8] | None = None
    label: str | None = None
    number_or_text: int | float | str = 0
    word: Literal["true", "1", "none"] | bool | int | None = None
    names: tuple[str | None, ...] = ()
    table: float | Mapping[str, tuple[int, ...]] = 0.5
    deep: Mapping[str, Mapping[str, float | str]] = field(default_factory=dict)
    memory: float | None = field(default=None, metadata={"unit": "MB"})
    page: int = field(default=1, metadata={"unit": "KiB"})

    def run(self, program, task):
        return 0


@dataclass(frozen=True)
class Plain(Analysis[int]):
    """Has no option."""

    name: ClassVar[str] = "plain"

    def run(self, program, task):
        return 0


@pytest.fixture(autouse=True, scope="module")
def known_passes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_registered", {"every": Every, "plain": Plain})
        yield


TRICKY = st.sampled_from(
    ["", "none", "true", "1", "1.0", "-2e5", "512MB", "a b", "{", "]", ":", ",", '"', "\\", "\n", "\u2028"]
)
STRINGS = st.text(max_size=8) | TRICKY
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
INTS = st.integers(-(10**30), 10**30)
LISTS = st.lists(st.integers(), max_size=3).map(tuple)

EVERY = st.builds(
    Every,
    flag=st.booleans(),
    count=INTS,
    ratio=FLOATS,
    title=STRINGS,
    choice=st.sampled_from(["a", "b c", "none"]),
    bits=st.sampled_from([4, 8, None]),
    label=st.none() | STRINGS,
    number_or_text=INTS | FLOATS | STRINGS,
    word=st.sampled_from(["true", "1", "none", True, False, 1, 7, None]),
    names=st.lists(st.none() | STRINGS, max_size=3).map(tuple),
    table=FLOATS | st.dictionaries(STRINGS, LISTS, max_size=3),
    deep=st.dictionaries(STRINGS, st.dictionaries(STRINGS, FLOATS | STRINGS, max_size=2), max_size=2),
    memory=st.none() | FLOATS,
    page=INTS,
)
PIPELINES = st.lists(EVERY | st.just(Plain()), min_size=1, max_size=3).map(lambda passes: Pipeline(tuple(passes)))


@given(PIPELINES)
def test_every_pipeline_reads_back_as_written(pipeline):
    text = str(pipeline)
    again = parse(text)
    assert again == pipeline
    assert str(again) == text
    for item, other in zip(pipeline, again, strict=True):
        for option in fields(item):  # 1 == 1.0 == True would hide a change of type
            assert type(getattr(item, option.name)) is type(getattr(other, option.name))


PIECES = st.sampled_from(
    [
        "every",
        "plain",
        "{",
        "}",
        "[",
        "]",
        ",",
        "=",
        ":",
        " ",
        '"',
        "\\",
        "count=1",
        "flag=true",
        "label=",
        "none",
        "\n",
        "'",
    ]
)
TEXTS = st.lists(PIECES | st.text(max_size=3), max_size=12).map("".join)


def read_or_point(text: str) -> None:
    fault = None
    try:
        pipeline = parse(text)
    except PipelineError as error:
        fault = error
    if fault is None:
        assert parse(str(pipeline)) == pipeline
    else:
        assert fault.text == text
        assert 0 <= fault.position <= len(text)
        assert str(fault).startswith(fault.reason)


@given(TEXTS)
def test_any_text_is_a_pipeline_or_an_error_that_points_into_it(text):
    read_or_point(text)


@given(PIPELINES, st.data())
def test_a_cut_pipeline_text_never_fails_otherwise(pipeline, data):
    text = str(pipeline)
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    read_or_point(text[:start] + text[end:])
