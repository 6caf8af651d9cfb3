"""What a model does only in training is listed, wherever its code asks for it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import BackwardCFunction

import fxcompress as fxc


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.function = function

    def forward(self, x):
        return self.function(self.linear(x))


def listed(model, code):
    program = fxc.trace(model, torch.randn(2, 3, 4))
    return [diagnostic.path for diagnostic in program.diagnostics if diagnostic.code == code]


def attend(module, x):
    return F.scaled_dot_product_attention(x, x, x, dropout_p=0.1 if module.training else 0.0)


class InHelper(nn.Module):
    def forward(self, x):
        return attend(self, x)


class InMethod(nn.Module):
    def forward(self, x):
        return self.dropped(x)

    def dropped(self, x):
        return F.dropout(x, 0.5, self.training)


class InClosure(nn.Module):
    def forward(self, x):
        return sum(F.dropout(part, 0.5, self.training) for part in x.split(2, -1))


@pytest.mark.parametrize(
    "inner", [InHelper(), InMethod(), InClosure(), nn.LSTM(4, 4, 2, dropout=0.5, batch_first=True)], ids=repr
)
def test_dropout_that_is_inactive_in_the_program_is_listed(inner):
    model = nn.Sequential(nn.Linear(4, 4), inner)
    assert listed(model, "training-only") == ["1"]


def test_layers_that_train_as_the_model_does_are_not_listed():
    assert listed(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), Calls(torch.tanh)), "training-only") == []


class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Raises(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        raise RuntimeError("on purpose")


def test_a_custom_backward_is_listed_once_with_its_place():
    model = nn.Sequential(Calls(torch.tanh), Calls(Round.apply), Calls(Round.apply))
    assert listed(model, "custom-backward") == ["1"]


def test_a_custom_backward_is_listed_on_meta():
    program = fxc.trace(Calls(Round.apply).to("meta"), torch.randn(2, 4, device="meta"))
    assert [d.code for d in program.diagnostics] == ["custom-backward"]


@pytest.mark.parametrize("function", [Round, Raises])
def test_autograd_is_as_before(function):
    try:
        fxc.trace(Calls(function.apply), torch.randn(2, 4))
    except fxc.FxCompressError:
        assert function is Raises
    assert "__init__" not in vars(BackwardCFunction)
    x = torch.randn(3, requires_grad=True)
    Round.apply(x).sum().backward()
    assert x.grad.tolist() == [1, 1, 1]
