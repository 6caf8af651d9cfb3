"""Reports: rows matched by name, totals, text and JSON."""

import json
from dataclasses import replace

import pytest
import torch
from reports import figures, tiny_report
from torch import nn

import fxcompress as fxc
from fxcompress.errors import ArtifactError, InputError
from fxcompress.formatting import BYTES, MACS, PARAMS, arrow, counted, measured, relative_change, seconds
from fxcompress.manager.pass_manager import PassManager
from fxcompress.report import Figures, LayerFigures, LayerRow, Measure, Report, Status, build_report
from fxcompress.report.build import LayerCost, match_layers
from fxcompress.verification.numerics import Comparison


@pytest.fixture
def report():
    return tiny_report()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (PARAMS.text(25_557_032), "25.557 M"),
        (PARAMS.text(999), "999"),
        (PARAMS.text(1000), "1.000 k"),
        (MACS.text(4_089_184_256), "4.09 G"),
        (MACS.text(999_999), "1.00 M"),
        (BYTES.text(102_228_128), "97.5 MiB"),
        (BYTES.text(0), "0 B"),
        (BYTES.text(1024 * 1024 - 1), "1.0 MiB"),
        (seconds(0.0384), "38 ms"),
        (seconds(1.5), "1.50 s"),
        (relative_change(1000, 569), "-43.1 %"),
        (relative_change(1000, 1200), "+20.0 %"),
        (relative_change(1_000_000, 999_999), "0.0 %"),
        (relative_change(0, 5), "new"),
        (relative_change(0, 0), "0.0 %"),
        (counted(1, "pass"), "1 pass"),
        (counted(2, "pass"), "2 passes"),
        (counted(0, "refusal"), "0 refusals"),
        (arrow("Conv2d", "Linear"), "Conv2d → Linear"),
        (arrow("8", "8"), "8"),
        (arrow("8", None), "8"),
    ],
)
def test_numbers_read_as_people_write_them(text, expected):
    assert text == expected


def test_a_metric_changes_by_points_and_a_latency_by_percent():
    assert measured(97.5, 97.1, "%") == ("97.50 %", "97.10 %", "-0.40 points")
    assert measured(0.975, 0.971, "") == ("0.9750", "0.9710", "-0.0040")
    assert measured(4.0, 2.0, "ms") == ("4 ms", "2 ms", "-50.0 %")
    assert measured(10.0, 5.0, "mJ") == ("10 mJ", "5 mJ", "-50.0 %")
    assert measured(4096, None, "B") == ("4.0 KiB", "", "")


@pytest.mark.parametrize(
    ("scale", "top"), [(PARAMS, 1), (PARAMS, 7), (MACS, 118_013_952), (BYTES, 9_437_184), (BYTES, 1024)]
)
def test_ticks_are_few_round_and_within_the_chart(scale, top):
    ticks = scale.ticks(top, 4)
    values = [value for value, _ in ticks]
    assert 2 <= len(values) <= 5
    assert values == sorted(values)
    assert values[-1] <= top
    assert all(len(label.split()[0]) <= 4 for _, label in ticks)


def test_the_status_says_what_became_of_a_layer(report):
    assert [row.status for row in report.layers] == ["changed", "removed", "changed", "added", "kept"]
    assert [report.count(status) for status in Status] == [1, 2, 1, 1]


def test_the_kind_is_the_one_the_layer_has_now():
    row = LayerRow("fc", figures("Linear"), figures("QuantizedLinear"))
    assert (row.kind, replace(row, after=None).kind, row.status) == ("QuantizedLinear", "Linear", "changed")


def test_totals_are_the_sums_of_the_layers(report):
    assert report.before == Figures(1_290_232, 2_586_912, 5_160_928, 3 * 256 + 80)
    assert report.after == Figures(1_290_132, 2_583_496, 5_160_528, 2 * 128 + 32 + 80)


def test_layers_are_matched_by_name_and_removed_ones_stand_where_they_were():
    def costs(*names: str) -> list[LayerCost]:
        class Cost(LayerFigures):
            name: str

        made = []
        for name in names:
            cost = Cost(**vars(figures()))
            object.__setattr__(cost, "name", name)
            made.append(cost)
        return made

    rows = list(match_layers(costs("a", "bn1", "b", "bn2", "bn3"), costs("new", "a", "b", "last"), {"b": "noted"}))
    assert [(row.name, row.status) for row in rows] == [
        ("new", "added"),
        ("a", "kept"),
        ("bn1", "removed"),
        ("b", "kept"),
        ("last", "added"),
        ("bn2", "removed"),
        ("bn3", "removed"),
    ]
    assert [row.note for row in rows] == ["", "", "", "noted", "", "", ""]


class Mix(nn.Module):
    def forward(self, x):
        return x @ x.transpose(-1, -2)


class Net(nn.Module):
    """One norm that folds, one that cannot since the convolution's output has another user, and an operator."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.conv = nn.Conv2d(8, 8, 1)
        self.norm = nn.BatchNorm2d(8)
        self.mix = Mix()

    def forward(self, x):
        y = self.conv(self.stem(x))
        return self.mix(self.norm(y) + y)


@pytest.fixture(scope="module")
def result():
    torch.manual_seed(0)
    program = fxc.trace(Net().eval(), torch.randn(2, 3, 6, 6))
    return PassManager("fold-batchnorm", instruments=()).run(program)


def test_a_folded_norm_is_a_removed_row_before_the_layer_that_followed(result):
    rows = {row.name: row for row in result.report.layers}
    assert rows["stem.1"].status == "removed"
    assert rows["stem.0"].status == "changed"  # it has a bias now
    assert (rows["stem.0"].before.params, rows["stem.0"].after.params) == (216, 224)
    assert rows["conv"].status == "kept"
    names = [row.name for row in result.report.layers]
    assert names.index("stem.1") == names.index("stem.0") + 1


def test_totals_agree_with_the_cost_analysis_and_with_the_models(result):
    for totals, program in ((result.report.before, result.before), (result.report.after, result.program)):
        cost = program.analyze("cost")
        assert totals.params == sum(p.numel() for p in program.graph_module.parameters())
        assert totals == Figures.of(cost.layers)


def test_the_report_holds_passes_refusals_and_where_operators_run(result):
    report = result.report
    assert report.title == "Net"
    assert [(row.text, row.changed) for row in report.passes] == [("fold-batchnorm", True)]
    assert report.passes[0].statistics == {"folded": 1}
    assert report.refusals == result.records[0].result.refusals
    assert len(report.refusals) == 1
    assert {row.name: row.note for row in report.layers if row.note} == {"norm": "fold-batchnorm: extra-users"}
    assert next(row.path for row in report.layers if row.name.startswith("matmul")).startswith("mix.matmul")
    measured_record = replace(result.records[0], comparison=Comparison(1e-6, 2e-7, 130.0, False))
    measures = [Measure("top-1", 1.0, 1.0)]
    again = build_report(result.before, result.program, [measured_record], measures)
    assert again.passes == (replace(report.passes[0], comparison=measured_record.comparison),)
    assert (again.layers, again.measures) == (report.layers, tuple(measures))
    assert set(report.environment) == {"fxcompress", "torch", "python", "platform"}


GOLDEN = """\
Tiny

               before    after        change
-----------  --------  -------  ------------
params        1.290 M  1.290 M         0.0 %
MACs           2.59 M   2.58 M        -0.1 %
weights       4.9 MiB  4.9 MiB         0.0 %
activations     848 B    368 B       -56.6 %
top-1         97.50 %  97.10 %  -0.40 points
latency        4.2 ms   2.1 ms       -50.0 %
file          4.0 KiB

layer      status    kind         output            params             MACs        weights  note
---------  --------  -----------  -------------  ---------  ---------------  -------------  -------
stem.conv  changed   Conv2d       2x8x4 → 2x4x4  216 → 112  6.91 k → 3.46 k  864 B → 448 B
stem.norm  removed   BatchNorm2d  2x8x4                 16                0           64 B
relu       changed   aten.relu    2x8x4 → 2x4x4          0                0            0 B
scale      added     Linear       2x4                   20               40           80 B
head       kept      Linear       2x10             1.290 M           2.58 M        4.9 MiB  refused

pass                          time  changed    did                     refusals  error
--------------------------  ------  ---------  --------------------  ----------  -------------------------------------
fold-batchnorm               38 ms  yes        folded 1, error 0.25           1  max rel error 2.50e-07, SQNR 132.0 dB
remove-channels{ratio=0.5}  1.50 s  yes                                       0  bit-equal

Refusals
  shared-weight [head]: its weight is also read by 'tail'; untie them

Diagnostics
  training-only [stem.drop]: DropPath behaves differently in training
"""

GOLDEN_DEPTH_1 = """\
layer    status    kind                 output            params             MACs        weights  note
-------  --------  -------------------  -------------  ---------  ---------------  -------------  --------------------
stem     changed   3 layers → 2 layers  2x8x4 → 2x4x4  232 → 112  6.91 k → 3.46 k  928 B → 448 B  2 changed, 1 removed
scale    added     Linear               2x4                   20               40           80 B
head     kept      Linear               2x10             1.290 M           2.58 M        4.9 MiB  refused
"""


def test_table(report):
    assert report.table() + "\n" == GOLDEN


def test_table_by_depth_changes_the_layers_only(report):
    head, _, rest = GOLDEN.partition("layer      status")
    _, _, tail = rest.partition("\n\n")
    assert report.table(depth=1) + "\n" == f"{head}{GOLDEN_DEPTH_1}\n{tail}"


@pytest.mark.parametrize("depth", [0, -1, 1.5, "2"])
def test_a_depth_that_is_no_positive_number_is_refused(report, depth):
    with pytest.raises(InputError, match="depth of a report's table"):
        report.table(depth=depth)


def test_a_summed_row_has_the_sums_of_its_layers(report):
    from fxcompress.report.text import by_depth

    rows = by_depth(report.layers, 1)
    assert [row.name for row in rows] == ["stem", "scale", "head"]
    assert Figures.of(row.before for row in rows) == report.before
    assert Figures.of(row.after for row in rows) == report.after
    assert rows[0].note == "2 changed, 1 removed"
    assert rows[2] == report.layers[4]


def test_repr_is_one_line_worth_reading(report):
    assert repr(report) == (
        "Report(Tiny: params 1.290 M -> 1.290 M (0.0 %), MACs 2.59 M -> 2.58 M (-0.1 %), "
        "2 changed, 1 removed, 1 added, 1 refusal)"
    )


def test_json_round_trip(report, result):
    assert Report.from_json(report.to_json()) == report
    assert Report.from_json(result.report.to_json()) == result.report


def test_json_is_strict_and_says_status_and_totals(report):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    document = json.loads(report.to_json(), parse_constant=refuse)
    assert (document["schema"], document["version"]) == ("fxcompress-report", 1)
    assert document["passes"][1]["comparison"]["sqnr_db"] == "inf"
    assert [layer["status"] for layer in document["layers"]] == ["changed", "removed", "changed", "added", "kept"]
    assert document["totals"]["after"]["params"] == report.after.params


def test_json_of_a_newer_version_is_refused(report):
    text = report.to_json().replace('"version": 1', '"version": 2')
    with pytest.raises(ArtifactError, match="version 2 of the schema, and this fxcompress reads version 1"):
        Report.from_json(text)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"schema": "other", "version": 1}', "[" * 100_000, "null"])
def test_json_that_is_no_report_is_refused(text):
    with pytest.raises(ArtifactError, match=r"give what Report\.to_json\(\) wrote"):
        Report.from_json(text)


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.pop("layers"),
        lambda d: d["layers"][0]["before"].update(params="many"),
        lambda d: d["layers"][0].update(before=[]),
        lambda d: d["passes"][0]["refusals"][0].update(more=1),
        lambda d: d["passes"][0].update(statistics=None),
        lambda d: d.update(environment=[]),
    ],
)
def test_damaged_json_is_refused(report, damage):
    document = json.loads(report.to_json())
    damage(document)
    with pytest.raises(ArtifactError, match="the report is damaged"):
        Report.from_json(json.dumps(document))
