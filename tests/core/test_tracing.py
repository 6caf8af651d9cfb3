"""What trace promises: any module in, a Program in normal form out that computes the same, and the model untouched."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from tracing_models import Model, assert_same

import fxcompress as fxc
from fxcompress.verification.verifier import violations


def layers(program):
    """Raised layers by their qualified name."""
    root = program.graph_module
    return {str(n.target): root.get_submodule(str(n.target)) for n in program.nodes if n.op == "call_module"}


def calls(program):
    return [str(node.target) for node in program.nodes if node.op == "call_function"]


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
