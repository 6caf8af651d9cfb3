"""ranges: what the values of each node span on the calibration batches."""

import math

import pytest
import torch
from fxcompress.passes.quantization.grid import Grid, Range
from fxcompress.passes.quantization.observers import observer_of
from fxcompress.passes.ranges import RangeReport
from torch import nn

from fxcompress import InputError, Task, analyze, trace


def batches(count=4, rows=4, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, *(shape or (6,)), generator=generator) for _ in range(count)]


def program(model=None):
    torch.manual_seed(0)
    return trace((model or nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))).eval(), torch.randn(2, 6))


def observed(name, *tensors, grid=None):
    found = observer_of(name)()
    for tensor in tensors:
        found.update(tensor)
    return found.range(grid or Grid())


def test_minmax_spans_all_batches():
    data = batches()
    net = program()
    report = analyze(net, "ranges", Task(calibration=data))

    rows = torch.cat(data)
    with torch.no_grad():
        hidden = net.graph_module.get_submodule("0")(rows)
    assert list(report.ranges) == [node.name for node in net.nodes if node.op != "output"]
    first, linear, relu, _ = report.ranges.values()
    assert first == Range(rows.min().item(), rows.max().item())
    assert linear.low == pytest.approx(hidden.min().item(), rel=1e-6)
    assert relu == Range(0.0, linear.high)
    assert report.rows == 16


def test_each_index_of_an_axis_has_a_range():
    data = batches()
    report = analyze(program(), "ranges{axis=-1}", Task(calibration=data))
    whole = analyze(program(), "ranges", Task(calibration=data))

    rows = torch.cat(data)
    found = next(iter(report.channels.values()))
    assert [each.low for each in found] == rows.amin(0).tolist()
    assert [each.high for each in found] == rows.amax(0).tolist()
    assert [len(each) for each in report.channels.values()] == [6, 8, 8, 3]
    assert report.ranges == whole.ranges
    assert not whole.channels


@pytest.mark.parametrize("name", ["percentile", "mse", "entropy"])
def test_indices_do_not_share_what_was_seen(name):
    data = [batch * torch.tensor([1.0, 100.0, 1.0, 1.0, 1.0, 1.0]) for batch in batches()]
    found = next(
        iter(analyze(program(), f"ranges{{observer={name} axis=1}}", Task(calibration=data)).channels.values())
    )
    assert found[1].high > 10 * found[0].high
    assert found[0] == observed(name, *(batch[:, 0] for batch in data))


def test_values_without_the_axis_stay_whole():
    report = analyze(program(), "ranges{axis=2}", Task(calibration=batches()))
    assert not report.channels
    assert report.ranges == analyze(program(), "ranges", Task(calibration=batches())).ranges


def test_an_axis_that_changes_its_size_is_refused():
    with pytest.raises(InputError, match=r"has 4 indices along axis 0, and 3 on calibration batch 1; choose an axis"):
        analyze(program(), "ranges{axis=0}", Task(calibration=[*batches(1), *batches(1, 3)]))


def test_moving_average_follows_the_batches():
    found = observed("moving-average", torch.tensor([-1.0, 1.0]), torch.tensor([-2.0, 11.0]))
    assert found.low == pytest.approx(-1.1)
    assert found.high == pytest.approx(2.0)


def test_percentile_leaves_outliers_out():
    values = torch.linspace(-1, 2, 100_001)
    found = observed("percentile", values, torch.tensor([500.0, -300.0]))
    assert found.low == pytest.approx(-1, abs=0.2)
    assert found.high == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize("name", ["mse", "entropy"])
def test_the_optimum_is_between_everything_and_nothing(name):
    generator = torch.Generator().manual_seed(0)
    values = torch.distributions.Laplace(0.0, 1.0).icdf(torch.rand(200_000, generator=generator) * 0.999998 + 1e-6)
    found = observed(name, values, grid=Grid(bits=4))
    assert 0.2 * values.max() < found.high < 0.8 * values.max()
    assert 0.2 * values.min() > found.low > 0.8 * values.min()


def test_zeros_do_not_make_entropy_cut_off_the_rest():
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(100_000, generator=generator) - 1).relu()
    assert observed("entropy", values, grid=Grid(bits=8)).high > 0.5 * values.max()


def test_mse_finds_the_least_error_among_all_symmetric_clips():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(100_000, generator=generator, dtype=torch.float64)
    grid = Grid(bits=4, symmetric=True)

    def error(high):
        return (grid.parameters(Range(-high, high)).rounded(values) - values).square().mean()

    least = min(error(high) for high in torch.linspace(0.5, 4.5, 400).tolist())
    found = observed("mse", values, grid=grid)
    assert (grid.parameters(found).rounded(values) - values).square().mean() <= 1.01 * least


@pytest.mark.parametrize("name", ["minmax", "moving-average", "percentile", "mse", "entropy"])
def test_values_that_are_all_the_same_have_a_range(name):
    assert observed(name, torch.zeros(10)) == Range(0.0, 0.0)
    assert observed(name, torch.full((10,), 3.0)).high == pytest.approx(3.0, rel=0.1)


def test_a_histogram_does_not_depend_on_the_order_of_batches():
    small, large = batches(1)[0], 1000 * batches(1, seed=1)[0]
    assert observed("percentile", small, large) == observed("percentile", large, small)


def test_the_report_reads_back_what_it_writes():
    report = analyze(program(), "ranges", Task(calibration=batches()))
    again = RangeReport.from_json(report.to_json())
    assert again == report
    channels = analyze(program(), "ranges{axis=-1}", Task(calibration=batches()))
    assert RangeReport.from_json(channels.to_json()) == channels
    unbounded = RangeReport({"x": Range(-math.inf, 1.0)}, 1, "")
    assert RangeReport.from_json(unbounded.to_json()) == unbounded
    with pytest.raises(InputError, match="the text is no report of ranges"):
        RangeReport.from_json("[]")
    with pytest.raises(InputError, match="format 99"):
        RangeReport.from_json(report.to_json().replace('"format": 2', '"format": 99'))


class Masked(nn.Module):
    def forward(self, x):
        return (x + torch.full((6,), -math.inf)).relu() + x


class Root(nn.Module):
    def forward(self, x):
        return x.sqrt()


def test_infinite_values_are_told_apart():
    report = analyze(program(Masked()), "ranges", Task(calibration=batches()))
    assert not report.ranges["add"].finite
    assert report.ranges["add_1"].finite


def test_nan_names_the_node_and_the_batch():
    data = batches()
    data[2][1, 3] = math.nan
    with pytest.raises(InputError, match="input_1 is NaN on calibration batch 2, and so is"):
        analyze(program(), "ranges", Task(calibration=data))
    data[2][1, 3] = math.inf
    with pytest.raises(InputError, match=r"^_2 computes NaN on calibration batch 2, where input_1 is infinite; check"):
        analyze(program(), "ranges", Task(calibration=data))
    net = trace(Root().eval(), torch.rand(2, 6))
    with pytest.raises(InputError, match="sqrt computes NaN on calibration batch 0"):
        analyze(net, "ranges", Task(calibration=batches()))


def test_nan_that_does_not_come_out_is_no_error():
    class Mends(nn.Module):
        def forward(self, x):
            return x.sqrt().nan_to_num()

    report = analyze(trace(Mends(), torch.rand(2, 6)), "ranges", Task(calibration=batches()))
    assert not report.ranges["sqrt"].finite
    assert report.ranges["nan_to_num"].finite


def test_a_batch_that_the_model_fails_on_is_named():
    class Sum(nn.Module):
        def forward(self, a, b):
            return a + b

    two = (torch.randn(2, 6), torch.randn(2, 6))
    task = Task(calibration=[(two,), ((torch.randn(4, 6), two[1]),)])
    with pytest.raises(InputError, match=r"^the model fails on calibration batch 1: The size of tensor .*; check that"):
        analyze(trace(Sum(), two), "ranges", task)


def test_no_data_too_little_and_the_wrong_structure():
    with pytest.raises(InputError, match="ranges needs calibration batches: give task="):
        analyze(program(), "ranges")
    with pytest.raises(InputError, match=r"saw 3 calibration samples, which is too few.*at least 8, or set least=3"):
        analyze(program(), "ranges", Task(calibration=batches(1, 3)))
    analyze(program(), "ranges{least=3}", Task(calibration=batches(1, 3)))
    with pytest.raises(InputError) as wrong:
        analyze(program(), "ranges", Task(calibration=[*batches(), {"y": torch.randn(2, 6)}]))
    assert "calibration batch 4, read by ranges" in wrong.value.__notes__
    assert "has the inputs (*(), **{'y': tensor}), but the model was traced with (*(tensor,), **{})" in str(wrong.value)
    with pytest.raises(InputError) as wrong:
        analyze(program(), "ranges", Task(calibration=[((torch.randn(2, 6), 1), 0)]))
    assert any("Task.inputs can make its inputs of a batch" in note for note in wrong.value.__notes__)
    doubled = analyze(program(), "ranges", Task(calibration=[batch.double() for batch in batches()]))
    assert doubled.ranges == analyze(program(), "ranges", Task(calibration=batches())).ranges
    for bad in (torch.ones(2, 6, dtype=torch.uint8), torch.randn(6), torch.randn(2, 5)):
        with pytest.raises(InputError, match=r"input '.*' is .* where the model was traced with .*\(any, 6\)") as wrong:
            analyze(program(), "ranges", Task(calibration=[*batches(), bad]))
        assert "calibration batch 4, read by ranges" in wrong.value.__notes__
    with pytest.raises(InputError, match=r"input 'input' is None: give a torch.Tensor"):
        analyze(program(), "ranges", Task(calibration=[*batches(), None]))
    with pytest.raises(InputError, match=r"a batch is an empty list; its first entry is the model's input"):
        analyze(program(), "ranges", Task(calibration=[*batches(), []]))
    with pytest.raises(InputError, match="no observer 'minmex'; did you mean 'minmax'"):
        analyze(program(), "ranges{observer=minmex}")


def test_batches_are_read_one_at_a_time():
    read = []

    class Batches:
        def __iter__(self):
            for batch in batches():
                read.append(batch)
                yield batch

    class Counting(nn.Module):
        def forward(self, x):
            return x * 2

    analyze(program(Counting()), "ranges{batches=3}", Task(calibration=Batches()))
    assert len(read) == 3
