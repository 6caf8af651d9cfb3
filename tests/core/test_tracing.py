"""What trace promises: any module in, a Program in normal form out that computes the same, and the model untouched."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils import _pytree as pytree

import fxcompress as fxc
from fxcompress.verification.numerics import compare_outputs
from fxcompress.verification.verifier import violations


def layers(program):
    """Raised layers by their qualified name."""
    root = program.graph_module
    return {str(n.target): root.get_submodule(str(n.target)) for n in program.nodes if n.op == "call_module"}


def calls(program):
    return [str(node.target) for node in program.nodes if node.op == "call_function"]


def assert_same(model, program, *args, **kwargs):
    model.eval()
    with torch.no_grad():
        expected = pytree.tree_leaves(model(*args, **kwargs))
        found = pytree.tree_leaves(program(*args, **kwargs))
    assert compare_outputs(expected, found).max_rel_error < 1e-6


class Model(nn.Module):
    """A module whose forward is given as a function; its state is what the keywords say."""

    def __init__(self, function, **state):
        super().__init__()
        self.function = function
        for name, value in state.items():
            setattr(self, name, value)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def settled(norm):
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_()
        if getattr(norm, "running_mean", None) is not None:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return norm


STANDARD_LAYERS = [
    (nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), (2, 4, 16)),
    (nn.Conv2d(4, 6, (3, 1), padding=(1, 0), bias=False), (2, 4, 8, 8)),
    (nn.Conv3d(2, 4, 2), (2, 2, 4, 4, 4)),
    (nn.Conv2d(4, 6, 3, padding="same"), (2, 4, 8, 8)),
    (nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 8)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (2, 4, 5, 5)),
    (nn.ConvTranspose3d(2, 4, 2, bias=False), (2, 2, 3, 3, 3)),
    (nn.Linear(4, 6), (2, 4)),
    (nn.Linear(4, 6, bias=False), (2, 3, 4)),
    (settled(nn.BatchNorm1d(4)), (2, 4)),
    (settled(nn.BatchNorm1d(4, momentum=None)), (2, 4, 5)),
    (settled(nn.BatchNorm2d(4, eps=1e-3, momentum=0.3)), (2, 4, 3, 3)),
    (settled(nn.BatchNorm3d(4)), (2, 4, 2, 2, 2)),
    (nn.BatchNorm2d(4, affine=False), (2, 4, 3, 3)),
    (nn.BatchNorm2d(4, track_running_stats=False), (2, 4, 3, 3)),
    (nn.InstanceNorm1d(4, affine=True), (2, 4, 9)),
    (settled(nn.InstanceNorm2d(4, affine=True, track_running_stats=True)), (2, 4, 5, 5)),
    (settled(nn.LayerNorm(4, eps=1e-3)), (2, 3, 4)),
    (nn.LayerNorm((3, 4), bias=False), (2, 3, 4)),
    (nn.RMSNorm(4), (2, 3, 4)),
    (settled(nn.GroupNorm(2, 4)), (2, 4, 3)),
    (nn.PReLU(4), (2, 4, 3)),
    (nn.Dropout(0.3), (2, 4)),
    (nn.Dropout2d(0.3), (2, 4, 3, 3)),
    (nn.AlphaDropout(0.2), (2, 4)),
]


@pytest.mark.parametrize(("layer", "shape"), STANDARD_LAYERS, ids=lambda v: repr(v) if isinstance(v, nn.Module) else "")
def test_a_standard_layer_is_raised_as_itself(layer, shape):
    model = nn.Sequential(nn.Identity(), layer)
    x = torch.randn(shape)
    program = fxc.trace(model, x)
    assert list(layers(program)) == ["1"]
    raised = layers(program)["1"]
    assert type(raised) is type(layer)
    assert raised.extra_repr() == layer.extra_repr()
    emitted = program.emit()
    assert set(emitted.state_dict()) == set(model.state_dict())
    assert_same(model, program, x)
    torch.manual_seed(0)
    expected = model.train()(x)
    torch.manual_seed(0)
    assert torch.equal(emitted.train()(x), expected)
    for name, tensor in model.state_dict().items():
        assert torch.equal(emitted.state_dict()[name], tensor), name


def test_embedding_is_raised_with_its_padding():
    model = nn.Sequential(nn.Embedding(10, 4, padding_idx=2))
    program = fxc.trace(model, torch.randint(0, 10, (2, 3)))
    assert layers(program)["0"].padding_idx == 2


def test_a_layer_with_state_of_its_own_beside_the_weights_stays_a_call():
    class Scaled(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.scale = nn.Parameter(torch.full((4,), 2.0))

        def forward(self, x):
            return super().forward(x) * self.scale

    model = nn.Sequential(Scaled())
    program = fxc.trace(model, torch.randn(2, 4))
    assert layers(program) == {}
    assert "aten.linear.default" in calls(program)
    assert set(program.emit().state_dict()) == set(model.state_dict())


def test_a_computed_weight_stays_a_call():
    model = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)))
    program = fxc.trace(model, torch.randn(2, 3, 8, 8))
    assert layers(program) == {}
    assert set(program.emit().state_dict()) == set(model.state_dict())


def test_a_module_called_twice_stays_one_module():
    model = Model(lambda self, x: self.linear(F.relu(self.linear(x))), linear=nn.Linear(4, 4))
    program = fxc.trace(model, torch.randn(2, 4))
    assert [str(n.target) for n in program.nodes if n.op == "call_module"] == ["linear", "linear"]
    assert sum(1 for _ in program.emit().parameters()) == 2


def test_the_same_weights_with_other_attributes_stay_right():
    def forward(self, x):
        return self.conv(x) + F.conv2d(x, self.conv.weight, self.conv.bias, padding=2, dilation=2)

    model = Model(forward, conv=nn.Conv2d(4, 4, 3, padding=1))
    x = torch.randn(2, 4, 8, 8)
    program = fxc.trace(model, x)
    assert_same(model, program, x)
    assert "aten.conv2d.default" in calls(program)


def test_tied_parameters_stay_tied_under_all_their_names():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared = nn.Embedding(10, 4)
            self.encoder = nn.Embedding(10, 4)
            self.encoder.weight = self.shared.weight
            self.head = nn.Linear(4, 10, bias=False)
            self.head.weight = self.shared.weight

        def forward(self, ids):
            return self.head(self.encoder(ids))

    model = Tied()
    emitted = fxc.trace(model, torch.randint(0, 10, (2, 3))).emit()
    assert set(emitted.state_dict()) == {"shared.weight", "encoder.weight", "head.weight"}
    assert emitted.head.weight is emitted.encoder.weight is emitted.shared.weight
    assert emitted.head.weight is not model.head.weight


def test_the_batch_is_dynamic_and_a_batch_of_one_is_enough():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    program = fxc.trace(model, torch.randn(1, 3, 4))
    for rows in (1, 2, 5):
        assert_same(model, program, torch.randn(rows, 3, 4))


def test_other_dims_are_dynamic_on_request():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    program = fxc.trace(model, torch.randn(2, 3, 16, 16), dynamic={"input": (2, 3)})
    assert_same(model, program, torch.randn(3, 3, 20, 24))


def test_a_fixed_batch_on_request():
    model = Model(lambda self, x: self.linear(x.reshape(2, 12)), linear=nn.Linear(12, 3))
    x = torch.randn(2, 3, 4)
    with pytest.raises(fxc.CaptureError, match="batch_dim=None"):
        fxc.trace(model, x)
    program = fxc.trace(model, x, batch_dim=None)
    assert program.interface.batch_size is None
    assert_same(model, program, x)


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


def test_constants_are_folded_and_saved_nowhere():
    def forward(self, x):
        mask = torch.zeros(4, 4)
        mask[:, 2:] = 1
        return self.linear(x) * mask[1] + torch.arange(4)

    model = Model(forward, linear=nn.Linear(4, 4))
    program = fxc.trace(model, torch.randn(2, 4))
    assert not any(name in call for call in calls(program) for name in ("zeros", "scatter", "arange", "fill"))
    assert set(program.graph_module.state_dict()) == {"linear.weight", "linear.bias"}
    assert_same(model, program, torch.randn(3, 4))


def test_constants_computed_from_parameters_stay_trainable():
    model = Model(lambda self, x: x + self.table[torch.tensor([1, 0])].sum(), table=nn.Parameter(torch.randn(2, 4)))
    program = fxc.trace(model, torch.randn(2, 4))
    emitted = program.emit()
    emitted(torch.randn(2, 4)).sum().backward()
    assert emitted.table.grad is not None


def test_no_grad_regions_stay_without_gradient():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            with torch.no_grad():
                y = self.a(x)
            return self.b(y)

    model = Frozen()
    emitted = fxc.trace(model, torch.randn(2, 4)).emit()
    emitted(torch.randn(2, 4)).sum().backward()
    assert emitted.a.weight.grad is None
    assert emitted.b.weight.grad is not None


def test_what_happens_only_in_training_is_listed():
    class Path(nn.Module):
        def forward(self, x):
            return x * 0.5 if self.training else x

    program = fxc.trace(nn.Sequential(nn.Linear(4, 4), Path(), Path()).train(), torch.randn(2, 4))
    (found,) = [d for d in program.diagnostics if d.code == "training-only"]
    assert "Path (1, 2)" in found.message


def test_state_that_no_output_depends_on_is_dropped_and_listed():
    model = Model(lambda self, x: self.used(x), used=nn.Linear(4, 4), auxiliary=nn.Linear(4, 4))
    program = fxc.trace(model, torch.randn(2, 4))
    assert set(program.graph_module.state_dict()) == {"used.weight", "used.bias"}
    (found,) = [d for d in program.diagnostics if d.code == "unused-state"]
    assert "auxiliary.bias" in found.message
    assert "auxiliary.weight" in found.message


def test_attention_keeps_its_operations_in_the_graph():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).requires_grad_(False)
    program = fxc.trace(model, torch.randn(2, 5, 8))
    assert not any("transformer_encoder_layer" in call or "native_multi_head" in call for call in calls(program))
    assert {"linear1", "linear2", "norm1", "norm2"} <= set(layers(program))


def test_models_on_meta_are_traced_without_weights():
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        program = fxc.trace(model, torch.randn(2, 3, 8, 8))
    assert list(layers(program)) == ["0", "1"]
    assert all(parameter.is_meta for parameter in program.graph_module.parameters())
    assert list(violations(program)) == []


def test_graph_modules_and_exported_programs_are_models_too():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), settled(nn.BatchNorm2d(4)), nn.Dropout(0.1))
    x = torch.randn(2, 3, 8, 8)
    program = fxc.trace(model, x)
    again = fxc.trace(program.emit(), x)
    assert again.text() == program.text()
    exported = torch.export.export(model.eval(), (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    from_export = fxc.trace(exported)
    assert from_export.text() == program.text().replace("%input", "%input_1").replace("%input_1_1", "%input_1") or (
        [str(n.target) for n in from_export.nodes][1:] == [str(n.target) for n in program.nodes][1:]
    )
    assert set(from_export.graph_module.state_dict()) == set(model.state_dict())
    assert_same(model, from_export, torch.randn(3, 3, 8, 8))


def test_low_precision_models():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU()).bfloat16()
    x = torch.randn(2, 8, dtype=torch.bfloat16)
    program = fxc.trace(model, x)
    assert program(x).dtype is torch.bfloat16
    assert_same(model, program, x)


def test_repr_and_text_say_what_it_is():
    program = fxc.trace(nn.Sequential(nn.Linear(4, 2), nn.ReLU()), torch.randn(2, 4))
    assert repr(program) == "Program(Sequential: 2 operations, 10 parameters)"
    assert program.text() == (
        "%input_1 : f32[s0,4] = input\n"
        "%_0 : f32[s0,2] = 0[Linear(in_features=4, out_features=2, bias=True)](%input_1)\n"
        "%relu : f32[s0,2] = aten.relu(%_0)\n"
        "return (%relu)\n"
    )
