"""What trace promises for models and inputs off the beaten track."""

import operator
import pickle

import pytest
import torch
from torch import nn

import fxcompress as fxc


class Model(nn.Module):
    """A linear layer and a forward given as a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.linear = nn.Linear(4, 4)

    def forward(self, *args):
        return self.function(self, *args)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, mask=None, *others, scale=1.0, mode="add", **extra):
        y = self.linear(x) * scale
        y = y if mask is None else y * mask
        for other in (*others, *extra.values()):
            y = y + other if mode == "add" else y * other
        return y


def x():
    return torch.randn(2, 4)


CALLS = [
    ((), {"scale": 2.0}),
    ((None,), {}),
    ((None, x(), x()), {}),
    ((), {"scale": 2.0, "mode": "mul", "bias": x()}),
    ((x(), x()), {"mode": "mul", "scale": 0.5}),
]


@pytest.mark.parametrize(("args", "kwargs"), CALLS, ids=range(len(CALLS)))
def test_inputs_that_are_no_tensors_keep_their_place(args, kwargs):
    if "bias" in kwargs and torch.__version__ < "2.14":
        pytest.skip("torch.export of 2.13 cannot give a dynamic dim to a tensor that goes into **kwargs")
    model, first = Scaled(), x()
    emitted = fxc.trace(model, ((first, *args), kwargs)).emit()
    assert torch.equal(emitted(first, *args, **kwargs), model(first, *args, **kwargs))
    again = pickle.loads(pickle.dumps(emitted))
    assert torch.equal(again(first, *args, **kwargs), model(first, *args, **kwargs))


def test_another_value_for_a_fixed_input_is_an_error_not_a_wrong_answer():
    program = fxc.trace(Scaled(), ((x(), None), {"scale": 2.0}))
    emitted = program.emit()
    assert emitted(x(), None).shape == (2, 4)
    with pytest.raises(ValueError, match=r"'scale' was 2\.0 when the model was traced"):
        emitted(x(), None, scale=3.0)
    with pytest.raises(ValueError, match="'mask' was None"):
        emitted(x(), torch.ones(4), scale=2.0)
    with pytest.raises(fxc.InputError, match=r"traced with 2\.0"):
        program(x(), None, scale=3.0)
    with pytest.raises(fxc.InputError, match="traced with None"):
        program(x(), torch.ones(4), scale=2.0)


def zeros_written(self, x):
    out = torch.zeros(x.shape[0], 8)
    out[:, :4] = self.linear(x)
    out[:, 4:] += x
    return out


def flat_written(self, x):
    y = self.linear(x)
    y.flatten(0, 1)[0:2] = 7
    y[..., -1:] += 1
    return y


def table(self, x):
    return self.linear(x) * torch.tensor([1.0, 2.0, 3.0, 4.0]) + torch.ones(4).cumsum(0), torch.ones(3)


def sizes(self, x):
    return self.linear(x) + torch.arange(x.numel()).view(x.shape), x.new_ones(x.shape[0] * 2, 3)


@pytest.mark.parametrize("function", [zeros_written, flat_written, table, sizes])
def test_tracing_what_was_emitted_gives_the_same_text(function):
    program = fxc.trace(Model(function), x())
    assert fxc.trace(program.emit(), x()).text() == program.text()


def test_tensors_of_dynamic_size_survive_pickling():
    model = nn.LSTM(4, 6, 2, batch_first=True, bidirectional=True)
    inputs = torch.randn(2, 5, 4)
    emitted = pickle.loads(pickle.dumps(fxc.trace(model, inputs).emit()))
    more = torch.randn(3, 5, 4)
    torch.testing.assert_close(emitted(more), model(more))


def test_an_input_that_only_happens_to_have_as_many_rows_is_not_batched():
    model = Model(lambda self, x, weight: self.linear(x) @ weight)
    program = fxc.trace(model, (torch.randn(4, 4), torch.randn(4, 4)))
    assert program.interface.batch == {0: 0}
    args = torch.randn(7, 4), torch.randn(4, 4)
    assert torch.equal(program(*args), model(*args))


def test_a_negative_batch_dim_counts_from_the_end():
    program = fxc.trace(Model(lambda self, x: self.linear(x.t())), torch.randn(4, 3), batch_dim=-1)
    assert program.interface.batch == {0: 1}
    assert program(torch.randn(4, 5)).shape == (5, 4)


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"batch_dim": 9}, "no example input has a dim 9"),
        ({"batch_dim": "0"}, "give the number of a dim"),
        ({"dynamic": {"args_0": 1}}, r"give a tuple of dims, for example \{'args_0': \(1,\)\}"),
        ({"dynamic": {"args_0": (1,)}}, "size 1 in the example"),
    ],
)
def test_dims_that_do_not_fit_are_named(options, remedy):
    with pytest.raises(fxc.InputError, match=remedy):
        fxc.trace(Model(lambda self, x: self.linear(x)), torch.randn(2, 1, 4), **options)


def test_a_function_transform_is_named():
    with pytest.raises(fxc.CaptureError, match=r"function transform such as vmap.*trace_islands"):
        fxc.trace(Model(lambda self, x: torch.vmap(lambda row: self.linear(row))(x)), x())


def chunk_written(self, x):
    left, right = self.linear(x).chunk(2, 1)
    left.add_(1)
    right.mul_(left)
    return left, right


def split_written(self, x):
    y = self.linear(x)
    first, rest = y.split([1, 3], 1)
    first += 1
    rest *= 2
    return y, rest


def unbind_written(self, x):
    y = self.linear(x)
    for column in y.unbind(1):
        column.mul_(column)
    return y


def views_written(self, x):
    y = self.linear(x).reshape(-1, 2, 2)
    y.movedim(1, 2)[..., 0].zero_()
    y.swapaxes(1, 2)[:, 1].fill_(3)
    y.mT[:, 0].add_(1)
    return y


def squared(self, x):
    y = self.linear(x)
    y **= 2
    return y


@pytest.mark.parametrize("function", [chunk_written, split_written, unbind_written, views_written, squared])
def test_writes_that_only_inference_allows_or_that_are_rare(function):
    model = Model(function)
    program = fxc.trace(model, x())
    args = torch.randn(5, 4)
    with torch.no_grad():
        torch.testing.assert_close(program(args), model(args))


def test_out_arguments_are_named():
    def forward(self, x):
        out = torch.empty(x.shape[0], 4)
        torch.add(self.linear(x).detach(), 1, out=out)
        return out

    with pytest.raises(fxc.CaptureError, match=r"aten.add.out writes into out.*without out="):
        fxc.trace(Model(forward), x())


def test_sizes_are_read_once_from_the_input_that_has_them():
    def forward(self, x):
        y = self.linear(x)
        return y.new_zeros(y.shape[0]), torch.arange(y.numel()), torch.ones(x.shape[0], 2)

    program = fxc.trace(Model(forward), x())
    (size,) = [n for n in program.nodes if n.target is torch.ops.aten.sym_size.int]
    assert size.args[0].op == "placeholder"
    assert sum(n.target is operator.mul for n in program.nodes) == 1


def test_a_number_of_elements_is_a_product_of_sizes():
    program = fxc.trace(nn.EmbeddingBag(10, 4), torch.randint(0, 10, (3, 4)))
    assert "sym_numel" not in program.text()
    assert program(torch.randint(0, 10, (5, 4))).shape == (5, 4)


def test_an_exported_program_with_inputs_that_are_no_tensors_keeps_its_batch():
    model, args = Scaled().eval(), (x(), None, x(), x())
    rows = {0: torch.export.Dim("rows")}
    exported = torch.export.export(model, args, dynamic_shapes={"x": rows, "mask": None, "others": (rows, rows)})
    program = fxc.trace(exported)
    assert program.interface.batch == {0: 0, 2: 0, 3: 0}
    more = torch.randn(5, 4)
    assert torch.equal(program(more, None, more, more), model(more, None, more, more))


def test_a_deep_model_visits_every_node_a_fixed_number_of_times():
    model = nn.Sequential(*[nn.ReLU() for _ in range(1500)])
    program = fxc.trace(model, x())
    assert sum(node.op == "call_function" for node in program.nodes) == 1500
    assert torch.equal(program.emit()(torch.ones(3, 4)), torch.ones(3, 4))
