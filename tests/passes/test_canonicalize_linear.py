"""canonicalize-linear: products with a stored matrix become linear layers."""

import pytest
import torch
from fxcompress.passes.canonicalize_linear import CanonicalizeLinear
from models import inputs, run_pass
from torch import nn

import fxcompress as fxc
from fxcompress import trace
from fxcompress.verification.numerics import compare

aten = torch.ops.aten


class Products(nn.Module):
    """A layer as GPT-2 writes it, then a bare product, of three and of two dims."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.randn(4, 6))
        self.bias = nn.Parameter(torch.randn(6))
        self.second = nn.Parameter(torch.randn(6, 3), requires_grad=False)
        self.register_buffer("third", torch.randn(3, 5))

    def forward(self, x):
        flat = torch.addmm(self.bias, x.reshape(-1, 4), self.first)
        return torch.mm((flat.reshape(-1, 2, 6) @ self.second).reshape(-1, 3), self.third)


def seeded(make):
    torch.manual_seed(0)
    return make().double().eval()


@pytest.fixture
def before():
    return trace(seeded(Products), inputs(6, 4))


def test_products_become_linear_layers_with_the_transposed_weight(before, golden):
    after, result = run_pass(CanonicalizeLinear(), before)

    assert result.changed
    assert result.statistics == {"written": 3}
    assert compare(before, after).max_rel_error < 1e-12
    assert [n.target for n in after.nodes if n.op == "call_function"].count(aten.linear.default) == 3
    golden("canonicalize-linear", after.text())


def test_weights_keep_their_kind_and_get_a_new_name(before):
    after, _ = run_pass(CanonicalizeLinear(), before)

    parameters = dict(after.graph_module.named_parameters())
    assert {name: tensor.requires_grad for name, tensor in parameters.items()} == {
        "first_transposed": True, "bias": True, "second_transposed": False,
    }  # fmt: skip
    assert [name for name, _ in after.graph_module.named_buffers()] == ["third_transposed"]
    assert torch.equal(parameters["first_transposed"], before.graph_module.first.T)


def test_a_buffer_that_is_not_saved_still_is_not(before):
    before.graph_module._non_persistent_buffers_set.add("third")

    after, _ = run_pass(CanonicalizeLinear(), before)

    assert sorted(after.graph_module.state_dict()) == ["bias", "first_transposed", "second_transposed"]


def test_a_second_run_changes_nothing(before):
    after, _ = run_pass(CanonicalizeLinear(), before)

    _, result = run_pass(CanonicalizeLinear(), after)

    assert not result.changed
    assert result.statistics == {"written": 0}


def test_calls_that_share_a_weight_still_do():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return torch.relu(x @ self.weight) @ self.weight

    before = trace(seeded(Twice), inputs(3, 4))
    after, result = run_pass(CanonicalizeLinear(), before)

    assert result.statistics == {"written": 2}
    assert list(after.graph_module.state_dict()) == ["weight_transposed"]


class Tied(nn.Module):
    """An embedding whose table is a factor too."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return (x @ self.table) * self.table.sum()


class Scaled(Products):
    def forward(self, x):
        return torch.addmm(self.bias, x, self.first, alpha=0.5)


class Broadcast(Products):
    def forward(self, x):
        return torch.addmm(self.bias[:1], x, self.first)


class Both(Products):
    """One call of a weight is refused, so the other is as well."""

    def forward(self, x):
        return torch.addmm(self.bias, x, self.first) + torch.addmm(self.bias, x, self.first, beta=2)


@pytest.mark.parametrize(
    ("model", "codes"),
    [
        (Tied, ["shared-weight"]),
        (Scaled, ["scaled-sum"]),
        (Broadcast, ["broadcast-bias"]),
        (Both, ["shared-weight", "scaled-sum"]),
    ],
)
def test_refusals_name_the_call(model, codes):
    before = trace(seeded(model), inputs(3, 4))

    after, result = run_pass(CanonicalizeLinear(), before)

    assert not result.changed
    assert [refusal.code for refusal in result.refusals] == codes
    assert {refusal.node for refusal in result.refusals} <= {node.name for node in before.nodes}
    assert after.text() == before.text()


def test_products_of_values_and_batched_matrices_are_left_alone():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.batched = nn.Parameter(torch.randn(1, 4, 4))
            self.left = nn.Parameter(torch.randn(3, 3))

        def forward(self, x):
            return x @ x.transpose(-1, -2) + (self.left @ (x @ self.batched)) @ x.transpose(-1, -2)

    before = trace(seeded(Other), torch.randn(2, 3, 4, dtype=torch.float64))
    _, result = run_pass(CanonicalizeLinear(), before)

    assert not result.changed
    assert result.refusals == ()


def test_gpt2_gets_int8_layers():
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, n_positions=16, use_cache=False,
                        bos_token_id=0, eos_token_id=0)  # fmt: skip
    tokens = torch.randint(0, 50, (16, 8))
    task = fxc.Task(calibration=list(tokens.split(2)))
    before = trace(GPT2Model(config).eval(), tokens[:2])

    made = fxc.PassManager("canonicalize-linear,insert-qdq{vnni=true}").run(before, task)

    assert made.records[1].result.statistics["layers"] == 4
