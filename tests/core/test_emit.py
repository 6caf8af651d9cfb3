"""What emit gives: a plain GraphModule that trains, copies, pickles, exports and compiles."""

import copy
import pickle

import pytest
import torch
from torch import fx, nn
from torch.export import Dim

import fxcompress as fxc


class Block(nn.Module):
    """Convolution, batch norm, dropout, a raw parameter and a constant."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.scale = nn.Parameter(torch.rand(4, 1, 1))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        y = self.norm(self.conv(x)).relu() * self.scale + torch.arange(8.0)
        return {"logits": self.head(self.drop(y.mean((2, 3))))}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Block().eval()


@pytest.fixture
def x():
    return torch.randn(2, 3, 8, 8)


@pytest.fixture
def emitted(model, x):
    return fxc.trace(model, x).emit()


def test_it_is_a_plain_graph_module_in_eval_mode(emitted, model):
    assert type(emitted).__mro__[1] is fx.GraphModule
    assert not any(module.training for module in emitted.modules())
    assert set(emitted.state_dict()) == set(model.state_dict())
    emitted.graph.lint()


def test_training_it_gives_the_same_gradients_and_statistics(emitted, model, x):
    for net in (model, emitted):
        net.train()
        torch.manual_seed(3)
        net(x)["logits"].square().sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(emitted.get_parameter(name).grad, parameter.grad, atol=1e-6), name
    for name, buffer in model.named_buffers():
        assert torch.equal(emitted.get_buffer(name), buffer), name


def test_it_shares_no_tensor_with_the_model_or_the_program(model, x):
    program = fxc.trace(model, x)
    emitted = program.emit()
    ours = {tensor.data_ptr() for tensor in (*emitted.parameters(), *emitted.buffers())}
    for source in (model, program.graph_module):
        assert ours.isdisjoint(tensor.data_ptr() for tensor in (*source.parameters(), *source.buffers()))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_compute_the_same_and_stand_alone(emitted, x, clone):
    expected = emitted(x)["logits"]
    copied = clone(emitted)
    assert torch.equal(copied(x)["logits"], expected)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert torch.equal(emitted(x)["logits"], expected)


def test_a_pickled_copy_keeps_what_is_computed_from_buffers():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("index", torch.tensor([[2, 0], [1, 1]]))
            self.table = nn.Parameter(torch.randn(3, 4))

        def forward(self, x):
            return x + self.table[self.index.view(-1)].sum(0)

    emitted = fxc.trace(Table(), torch.randn(2, 4)).emit()
    copied = pickle.loads(pickle.dumps(emitted))
    assert set(copied.state_dict()) == {"index", "table"}
    x = torch.randn(3, 4)
    assert torch.equal(copied(x), emitted(x))


def test_it_exports_again_with_a_dynamic_batch(emitted, x):
    exported = torch.export.export(emitted, (x,), dynamic_shapes=({0: Dim.DYNAMIC},))
    other = torch.randn(5, 3, 8, 8)
    assert torch.allclose(exported.module()(other)["logits"], emitted(other)["logits"], atol=1e-6)


def test_it_compiles(emitted, x):
    compiled = torch.compile(emitted, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x)["logits"], emitted(x)["logits"], atol=1e-6)


def test_it_moves_between_dtypes(emitted, x):
    assert emitted.double()(x.double())["logits"].dtype is torch.float64


def test_inputs_that_are_no_tensors_keep_their_value_as_default(x):
    class Scaled(nn.Module):
        def forward(self, x, factor, mode="double"):
            return x * factor if mode == "double" else x

    emitted = fxc.trace(Scaled(), ((x, 3), {"mode": "double"})).emit()
    assert torch.equal(emitted(x), x * 3)
