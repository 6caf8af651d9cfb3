"""Pipeline text: what it means, that it round-trips, and where each error points."""

from collections.abc import Mapping
from dataclasses import FrozenInstanceError, dataclass, field
from typing import ClassVar, Literal

import pytest
from toys import CountNodes, Scale

from fxcompress import registry
from fxcompress.errors import InputError, PipelineError
from fxcompress.pass_base import Analysis
from fxcompress.pipeline.option_types import FrozenMapping
from fxcompress.pipeline.text import Pipeline, as_pipeline, parse


@dataclass(frozen=True)
class Every(Analysis[int]):
    """Has an option of every type."""

    name: ClassVar[str] = "every"
    flag: bool = False
    count: int = 1
    ratio: float | Mapping[str, float] = 0.5
    title: str = "plain"
    criterion: Literal["l1", "taylor", "fisher"] = "l1"
    bits: Literal[4, 8] = 8
    limit: float | None = None
    label: str | None = None
    layers: tuple[str, ...] = ()
    groups: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    max_memory: float | None = field(default=None, metadata={"unit": "MB"})
    page: int = field(default=4096, metadata={"unit": "B"})
    budget: float = field(default=1.0, metadata={"unit": "ms"})

    def run(self, program, task):
        return 0


@dataclass(frozen=True)
class Checked(Analysis[int]):
    """Has a required option with a range."""

    name: ClassVar[str] = "checked"
    ratio: float
    depth: int = 1

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.ratio < 1:
            raise InputError(f"option 'ratio' of 'checked' expects a number from 0 to 1, not {self.ratio}")

    def run(self, program, task):
        return 0


@pytest.fixture(autouse=True)
def known_passes(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    for cls in (Every, Checked, Scale, CountNodes):
        registry.register(cls)


CANONICAL = [
    "scale",
    "count-nodes,scale,count-nodes",
    "scale{factor=0.5}",
    "scale{factor=0.5 names=[0.weight 2.weight]},every{flag=true count=-3}",
    "every{ratio=1e-05}",
    "every{ratio={layer4.*:0.3 fc:0.1}}",
    "every{ratio={}}",
    'every{title="two words"}',
    'every{title=""}',
    r'every{title="a \"quote\", a \\ and a \n line"}',
    "every{criterion=taylor bits=4}",
    "every{limit=3.0 label=none-at-all}",
    'every{label="none"}',
    r'every{label="\u0007"}',
    "every{layers=[conv1 layer*.conv? \"a b\"]}",
    "every{groups={a:[1 2] b:[]}}",
    "every{max-memory=512MB page=512B budget=2.5ms}",
    "every{max-memory=0.1MB}",
    "checked{ratio=0.25}",
]  # fmt: skip


@pytest.mark.parametrize("text", CANONICAL)
def test_canonical_text_round_trips(text):
    assert str(parse(text)) == text
    assert parse(str(parse(text))) == parse(text)


def test_values_have_the_declared_types():
    (item,) = parse(
        "every{flag=true count=7 ratio={layer4.*:0.3 fc:1} title=x limit=2 layers=[a b] groups={a:[1 2]} bits=4}"
    )
    assert item == Every(
        flag=True, count=7, ratio=FrozenMapping({"layer4.*": 0.3, "fc": 1.0}), title="x", limit=2.0,
        layers=("a", "b"), groups=FrozenMapping({"a": (1, 2)}), bits=4,
    )  # fmt: skip
    assert type(item.limit) is float
    assert type(item.ratio["fc"]) is float


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        (" scale { factor = 0.5 } ,\n\tcount-nodes ", "scale{factor=0.5},count-nodes"),
        ("scale{}", "scale"),
        ("scale{factor=2}", "scale"),
        ("every{limit=none}", "every"),
        ("every{count=2 flag=true}", "every{flag=true count=2}"),
        ('every{title="plain" label="x"}', "every{label=x}"),
        ("every{ratio={a :1  b: 2}}", "every{ratio={a:1.0 b:2.0}}"),
    ],
)
def test_loose_text_becomes_canonical(text, canonical):
    assert str(parse(text)) == canonical


@pytest.mark.parametrize(
    ("text", "megabytes"),
    [
        ("512MB", 512.0), ("512", 512.0), ("0.1GB", 100.0), ("1GiB", 1073.741824), ("1KB", 0.001), ("1e3KB", 1.0),
    ],
)  # fmt: skip
def test_units_convert_exactly(text, megabytes):
    (item,) = parse(f"every{{max-memory={text}}}")
    assert item.max_memory == megabytes


def test_whole_numbers_of_units():
    assert parse("every{page=4KiB}") == parse("every")
    assert parse("every{page=0.1KB}") == parse("every{page=100}")
    with pytest.raises(
        PipelineError, match=r"'page' of 'every' expects a whole number with a unit such as B, not '0\.3B'"
    ):
        parse("every{page=0.3B}")


ERRORS = {
    "": """
        the pipeline is empty; name at least one pass

        ^""",
    "scale,": """
        trailing comma; remove it or name a pass after it
        scale,
             ^""",
    "scale,,every": """
        expected a pass name, not ','
        scale,,every
              ^""",
    "scale every": """
        expected ','; passes are written name{option=value option=value} with ',' between them
        scale every
              ^""",
    "scale}": """
        '}' closes nothing; passes are written name{option=value option=value} with ',' between them
        scale}
             ^""",
    "scale,evry": """
        unknown pass 'evry'; did you mean 'every'?
        scale,evry
              ^""",
    "scale{factor=1,every": """
        inside {} separate with spaces, not commas
        scale{factor=1,every
                      ^""",
    "scale,every{count=1": """
        '{' is not closed; add '}'
        scale,every{count=1
                   ^""",
    "every{layers=[a b}": """
        expected a value, not '}'
        every{layers=[a b}
                         ^""",
    "every{layers=[a b": """
        '[' is not closed; add ']'
        every{layers=[a b
                     ^""",
    "every{title=\"a b}": """
        this string is not closed; add a '"' at its end
        every{title="a b}
                    ^""",
    r'every{title="\q"}': r"""
        not a JSON escape; write "\\" for a backslash
        every{title="\q"}
                     ^""",
    "every{title=it's}": """
        "'" can stand only inside a "quoted" string
        every{title=it's}
                      ^""",
    'every{title=a"b"}': """
        put a space between two values
        every{title=a"b"}
                     ^""",
    "every{count}": """
        'count' needs a value: write count=value
        every{count}
                   ^""",
    "every{count=}": """
        expected a value for 'count', not '}'
        every{count=}
                    ^""",
    "every{count=1 flag=true count=2}": """
        'count' is given twice; keep one
        every{count=1 flag=true count=2}
                                ^""",
    "every{ratio={a:1 a:2}}": """
        'a' is given twice; keep one
        every{ratio={a:1 a:2}}
                         ^""",
    "every{max_memory=1}": """
        'every' has no option 'max_memory'; did you mean 'max-memory'?
        every{max_memory=1}
              ^""",
    "count-nodes{depth=1}": """
        'count-nodes' has no option 'depth'; it has none
        count-nodes{depth=1}
                    ^""",
    "every{flag=yes}": """
        option 'flag' of 'every' expects true or false, not 'yes'
        every{flag=yes}
                   ^""",
    "every{count=1.5}": """
        option 'count' of 'every' expects a whole number, not '1.5'
        every{count=1.5}
                    ^""",
    "every{ratio=half}": """
        option 'ratio' of 'every' expects a number or a table {name:value ...} of a number, not 'half'
        every{ratio=half}
                    ^""",
    "every{ratio={fc:half}}": """
        option 'ratio' of 'every' expects a number, not 'half'
        every{ratio={fc:half}}
                        ^""",
    "every{limit=nan}": """
        option 'limit' of 'every' expects a number or none, not 'nan'
        every{limit=nan}
                    ^""",
    "every{limit=1e999}": """
        option 'limit' of 'every' expects a number or none, not '1e999'
        every{limit=1e999}
                    ^""",
    "every{criterion=tailor}": """
        option 'criterion' of 'every' expects one of l1, taylor, fisher, not 'tailor'; did you mean 'taylor'?
        every{criterion=tailor}
                        ^""",
    "every{layers=conv1}": """
        option 'layers' of 'every' expects a list [...] of text, not 'conv1'
        every{layers=conv1}
                     ^""",
    "every{count=[1]}": """
        option 'count' of 'every' expects a whole number, not a list [...]
        every{count=[1]}
                    ^""",
    "every{max-memory=512mb}": """
        option 'max-memory' of 'every' expects a known unit, not 'mb'; known: B, KB, MB, GB, TB, KiB, MiB, GiB, TiB
        every{max-memory=512mb}
                            ^""",
    "every{count=1MB}": """
        option 'count' of 'every' expects a whole number, not '1MB'
        every{count=1MB}
                    ^""",
    "checked": """
        'checked' needs the option 'ratio': checked{ratio=...}
        checked
        ^""",
    "checked{ratio=1.5}": """
        option 'ratio' of 'checked' expects a number from 0 to 1, not 1.5
        checked{ratio=1.5}
                      ^""",
    "checked{depth=2 ratio=1.5}": """
        option 'ratio' of 'checked' expects a number from 0 to 1, not 1.5
        checked{depth=2 ratio=1.5}
        ^""",
    "scale,\nscale,\nevry": """
        unknown pass 'evry'; did you mean 'every'?
        evry
        ^""",
}  # fmt: skip


@pytest.mark.parametrize("text", ERRORS)
def test_errors_point_at_the_offending_character(text):
    with pytest.raises(PipelineError) as caught:
        parse(text)
    reason, *source = ERRORS[text].strip("\n").splitlines()
    expected = [reason[8:], *(line[6:].rstrip() for line in source)]
    assert [line.rstrip() for line in str(caught.value).splitlines()] == [line.rstrip() for line in expected]
    assert caught.value.text == text


def test_endless_nesting_is_refused():
    with pytest.raises(PipelineError, match="more than 16 lists and tables inside each other"):
        parse("every{layers=" + "[" * 5000)


def test_text_must_be_text():
    with pytest.raises(InputError, match="pipeline text must be a string, not 3"):
        parse(3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Every(count=1.5), "option 'count' of 'every' expects a whole number, not 1.5"),
        (lambda: Every(count=True), "option 'count' of 'every' expects a whole number, not True"),
        (lambda: Every(limit=float("inf")), "option 'limit' of 'every' expects a number or none, not inf"),
        (lambda: Every(criterion="tailor"), "expects one of l1, taylor, fisher, not 'tailor'; did you mean 'taylor'"),
        (lambda: Every(layers="conv1"), r"expects a list \[...\] of text, not 'conv1'"),
    ],
)
def test_options_given_in_python_are_checked_too(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_options_given_in_python_are_frozen():
    item = Every(ratio={"fc": 1}, layers=["a"], limit=2)
    assert item == parse("every{ratio={fc:1} layers=[a] limit=2}")[0]
    assert hash(item) == hash(parse("every{ratio={fc:1} layers=[a] limit=2}")[0])
    assert str(item) == "every{ratio={fc:1.0} limit=2.0 layers=[a]}"
    with pytest.raises(FrozenInstanceError):
        item.count = 2


def test_tables_are_equal_only_in_the_same_order():
    assert FrozenMapping({"a": 1, "b": 2}) != FrozenMapping({"b": 2, "a": 1})
    assert FrozenMapping({"a": 1}) == FrozenMapping({"a": 1})


def test_a_pipeline_is_a_frozen_sequence_of_passes():
    pipeline = as_pipeline([Scale(), CountNodes()])
    assert pipeline == parse("scale,count-nodes") == as_pipeline("scale,count-nodes") == as_pipeline(pipeline)
    assert list(pipeline) == [Scale(), CountNodes()]
    assert (len(pipeline), pipeline[1]) == (2, CountNodes())
    with pytest.raises(FrozenInstanceError):
        pipeline.passes = ()


def test_a_pipeline_holds_pass_instances_only():
    with pytest.raises(InputError, match="the pipeline is empty"):
        Pipeline(())
    with pytest.raises(
        InputError, match=r"item 1 of the pipeline is <class .*>, which is not a pass; .*: CountNodes\(\)"
    ):
        Pipeline((Scale(), CountNodes))
    with pytest.raises(InputError, match="item 0 of the pipeline is 'scale', which is not a pass; give instances"):
        Pipeline(("scale",))
    with pytest.raises(InputError, match="None is no pipeline; give pipeline text or a list of passes"):
        as_pipeline(None)
    with pytest.raises(InputError, match=r"Scale\(.*\) is no pipeline; put it in a list"):
        as_pipeline(Scale())
