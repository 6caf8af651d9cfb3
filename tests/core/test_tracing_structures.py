"""Inputs and outputs of any structure go in and come out as the model has them."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from tracing_models import Model, assert_same

import fxcompress as fxc


@dataclasses.dataclass
class Prediction:
    logits: torch.Tensor
    features: list


@dataclasses.dataclass(frozen=True)
class Batch:
    a: torch.Tensor
    others: "Batch | None" = None


@dataclasses.dataclass
class Nested:
    inner: Prediction
    size: int


STRUCTURES = {
    "positional": (lambda self, a, b: self.linear(a) + b, ((2, 4), (2, 4)), {}),
    "keyword": (lambda self, *, a, b: self.linear(a) + b, (), {"b": (2, 4), "a": (2, 4)}),
    "mixed": (lambda self, a, b: self.linear(a) + b, ((2, 4),), {"b": (2, 4)}),
    "tuple out": (lambda self, a: (self.linear(a), a), ((2, 4),), {}),
    "list out": (lambda self, a: [self.linear(a)], ((2, 4),), {}),
    "dict out": (lambda self, a: {"y": self.linear(a), "x": (a, None, 3)}, ((2, 4),), {}),
    "dataclass out": (lambda self, a: Prediction(self.linear(a), [a]), ((2, 4),), {}),
    "nested dataclass out": (lambda self, a: Nested(Prediction(self.linear(a), []), 3), ((2, 4),), {}),
}


def example(shapes):
    return pytree.tree_map(torch.randn, shapes, is_leaf=lambda v: isinstance(v, tuple) and v and isinstance(v[0], int))


@pytest.mark.parametrize("case", STRUCTURES.values(), ids=STRUCTURES)
def test_structures_of_inputs_and_outputs(case):
    function, args, kwargs = case

    class Case(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

    Case.forward = function
    model, args, kwargs = Case(), example(args), example(kwargs)
    program = fxc.trace(model, (args, kwargs))
    expected = model(*args, **kwargs)
    found = program.emit()(*args, **kwargs)
    assert pytree.tree_structure(found) == pytree.tree_structure(expected)
    assert type(found) is type(expected)
    assert_same(model, program, *args, **kwargs)


def test_dataclasses_come_in_without_registration():
    model = Model(lambda self, batch: self.linear(batch.a) + batch.others.a, linear=nn.Linear(4, 4))
    program = fxc.trace(model, Batch(torch.randn(2, 4), Batch(torch.randn(2, 4))))
    assert program.interface.batch_size == 2
    batch = Batch(torch.randn(5, 4), Batch(torch.randn(5, 4)))
    torch.testing.assert_close(program.emit()(batch), model(batch))


class Cache:
    """What PyTorch cannot take apart."""


def test_an_output_that_cannot_be_taken_apart_is_left_out_and_listed():
    model = Model(lambda self, x: {"y": self.linear(x), "cache": Cache()}, linear=nn.Linear(4, 4))
    x = torch.randn(2, 4)
    program = fxc.trace(model, x)
    found = program(x)
    assert torch.equal(found["y"], model(x)["y"])
    assert found["cache"] is None
    (dropped,) = [d for d in program.diagnostics if d.code == "output-dropped"]
    assert "['cache'] is a Cache" in dropped.message
    assert isinstance(model(x)["cache"], Cache)
    assert not model._forward_hooks


def test_an_output_that_is_nothing_else_is_refused():
    with pytest.raises(fxc.CaptureError, match="register its class"):
        fxc.trace(Model(lambda self, x: Cache()), torch.randn(2, 4))


def test_structured_inputs():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, batch, extra):
            return self.linear(batch["x"]) + batch["more"][0] + extra.logits + extra.features[0]

    x = [torch.randn(2, 4) for _ in range(4)]
    args = ({"x": x[0], "more": (x[1],)}, Prediction(x[2], [x[3]]))
    model = Nested()
    program = fxc.trace(model, args)
    emitted = program.emit()
    assert torch.equal(emitted(*args), model(*args))
    assert torch.equal(copy.deepcopy(emitted)(*args), model(*args))


def test_a_keyword_may_be_given_by_position_to_what_is_emitted():
    model = Model(lambda self, x: self.linear(x), linear=nn.Linear(4, 4))
    emitted = fxc.trace(nn.Sequential(model), {"input": torch.randn(2, 4)}).emit()
    x = torch.randn(2, 4)
    assert torch.equal(emitted(x), emitted(input=x))
