"""equalize: factors of channels move between layers, the outputs stay, and int8 errs less."""

import math

import pytest
import torch
from fxcompress.passes.equalization import factors
from fxcompress.passes.equalize import Equalize
from models import inputs
from torch import nn
from torch.nn import functional as F

from fxcompress import InputError, PassManager, Task, load, trace
from fxcompress.artifact import save
from fxcompress.verification.numerics import compare


def spread(model, seed=0):
    """The model in float64, with channels of very different sizes, both as they are made and as they are read."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.5, 0.5, generator=generator)
            for dim in range(min(parameter.dim(), 2)):
                sizes = torch.empty(parameter.shape[dim], dtype=torch.float64).uniform_(-3, 3, generator=generator)
                parameter *= sizes.exp().reshape([-1 if each == dim else 1 for each in range(parameter.dim())])
    return model


def equalized(model, x, **options):
    """The Program after; the manager has checked it against the one before, in float64 too."""
    before = trace(spread(model), x)
    done = PassManager([Equalize(**options)]).run(before, Task(calibration=[x]))
    assert compare(before, done.program).max_rel_error < 1e-12
    return before, done.program, done.records[0].result


@pytest.fixture
def everywhere(monkeypatch):
    """Factors wherever they can be, not only where they are expected to help."""
    monkeypatch.setattr(factors, "_WORTH", math.inf)


def check(model, x, count, refused=(), **options):
    before, after, result = equalized(model, x, **options)
    assert result.statistics == {"equalized": count}
    assert result.changed == (count > 0)
    assert sorted({refusal.code for refusal in result.refusals}) == sorted(refused)
    return before, after, result


IMAGES = inputs(4, 3, 8, 8)


def test_a_chain(everywhere):
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3, padding=1))
    before, after, _ = check(model, IMAGES, 1)
    assert after.text() == before.text()
    assert sorted(_changed(before, after)) == ["0.bias", "0.weight", "2.weight"]


def _changed(before, after):
    state = after.graph_module.state_dict()
    return [name for name, old in before.graph_module.state_dict().items() if not torch.equal(old, state[name])]


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(), nn.PReLU(6), nn.MaxPool2d(2), nn.Identity()])
def test_what_lets_factors_through(everywhere, activation):
    check(nn.Sequential(nn.Conv2d(3, 6, 3), activation, nn.Conv2d(6, 5, 3)), IMAGES, 1)


@pytest.mark.parametrize("activation", [nn.GELU(), nn.Sigmoid(), nn.Softmax(1), nn.GroupNorm(1, 6, affine=False)])
def test_what_does_not(activation):
    check(nn.Sequential(nn.Conv2d(3, 6, 3), activation, nn.Conv2d(6, 5, 3)), IMAGES, 0, [])


def test_a_value_that_something_else_reads_too():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 1)

        def forward(self, x):
            y = self.a(x)
            return self.b(y), y.sigmoid().mean((1, 2, 3))

    _, _, result = check(Both(), IMAGES, 0, ["no-factor"])
    assert "sigmoid" in result.refusals[0].reason


def test_a_depthwise_chain_gives_all_channels_one_range(everywhere):
    model = nn.Sequential(nn.Conv2d(3, 6, 1, bias=False), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(),
                          nn.Conv2d(6, 4, 1))  # fmt: skip
    _, after, _ = check(model, IMAGES, 2)
    first = list(after.nodes)[1]
    largest = after.graph_module.get_submodule(first.target)(IMAGES).detach().relu().amax((0, 2, 3))
    assert float(largest.max() / largest.min()) < 1 + 1e-9


def test_a_transposed_convolution_and_groups(everywhere):
    model = nn.Sequential(nn.ConvTranspose2d(3, 8, 2, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(),
                          nn.ConvTranspose2d(8, 4, 2, groups=2))  # fmt: skip
    check(model, IMAGES, 2)


def test_pooled_and_flattened(everywhere):
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5))
    check(model, IMAGES, 1)


class Residual(nn.Module):
    """All makers and readers of the stream take its factors up."""

    def __init__(self):
        super().__init__()
        self.stem, self.expand, self.project = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 1), nn.Conv2d(8, 6, 1)
        self.head, self.other = nn.Linear(6, 4), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.project(self.expand(x).relu())
        return self.head(x.mean((2, 3))), self.other(x)


def test_a_residual_stream_with_several_readers(everywhere):
    check(Residual(), IMAGES, 2)


def test_concatenation(everywhere):
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1), nn.Conv2d(7, 5, 1)

        def forward(self, x):
            x = self.a(x).relu()
            return self.c(torch.cat([x, self.b(x)], 1))

    check(Dense(), IMAGES, 1)


def test_squeeze_and_excite(everywhere):
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.squeeze, self.excite, self.b = (
                nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 5, 1)
            )  # fmt: skip

        def forward(self, x):
            x = self.a(x).relu()
            gate = self.excite(F.leaky_relu(self.squeeze(x.mean((2, 3), keepdim=True)))).sigmoid()
            return self.b(x * gate)

    check(Gated(), IMAGES, 2)


TOKENS = inputs(4, 5, 8)


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.RMSNorm(8)])
def test_linear_layers_after_a_norm(everywhere, norm):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.norm = nn.Linear(8, 8), norm
            self.a, self.b = nn.Linear(8, 6), nn.Linear(8, 3, bias=False)

        def forward(self, x):
            y = self.norm(self.stem(x))
            return self.a(y), self.b(y)

    _, after, _ = check(Block(), TOKENS, 1)
    assert "b.bias" not in after.graph_module.state_dict()


class Gate(nn.Module):
    """An RMSNorm written out, and a gate: factors go through what the gate is multiplied with."""

    def __init__(self):
        super().__init__()
        self.stem, self.weight = nn.Linear(8, 8), nn.Parameter(torch.ones(8))
        self.gate, self.up, self.down = (nn.Linear(a, b, bias=False) for a, b in ((8, 12), (8, 12), (12, 8)))

    def forward(self, x):
        x = self.stem(x)
        x = self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))
        return self.down(F.silu(self.gate(x)) * self.up(x))


def test_a_gated_unit_after_a_written_out_norm(everywhere):
    check(Gate(), TOKENS, 2)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.out = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.qkv = nn.ModuleList([nn.Linear(8, 8) for _ in "qkv"])

    def forward(self, x):
        x = self.norm(self.stem(x))
        q, k, v = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in self.qkv)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_values_of_attention(everywhere):
    check(Attention(), TOKENS, 2)


def test_a_sum_over_channels_and_a_channel_spread_over_all():
    """Both mix factors of several channels."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1)

        def forward(self, x):
            x = self.a(x)
            return self.b(x + x[:, :1])

    class Mean(Mixed):
        def forward(self, x):
            x = self.a(x)
            return self.b(x * x.mean(1, keepdim=True))

    for model in (Mean(), Mixed()):
        _, _, result = equalized(model, IMAGES)
        assert not result.changed


def test_relu6_needs_a_bound_for_each_channel(everywhere, golden):
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU6(), nn.Conv2d(6, 4, 1))
    _, _, result = check(model, IMAGES, 0, ["clamp"])
    assert "clamps=true" in result.refusals[0].reason
    _, after, _ = check(model, IMAGES, 1, clamps=True)
    golden("equalize-clamps", after.text())


def test_a_shared_layer_is_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.shared = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.shared(self.shared(self.first(x).relu()).relu())

    check(Twice(), TOKENS, 0, ["shared-weight"])


class Chunks(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        first, second = self.a(x).chunk(2, -1)
        return self.b(torch.cat([second, first], -1))


class Sizes(Chunks):
    def forward(self, x):
        made = self.a(x)
        return self.b(made.view(made.shape[0] * made.shape[1], 8).relu()), made.max(-1), made.argmax(-1)


@pytest.mark.parametrize("model", [Chunks(), Sizes()])
def test_pieces_and_sizes_beside_a_value(model):
    equalized(model, inputs(4, 3, 6))


def test_twice_is_once(tmp_path):
    _, after, _ = equalized(Residual(), IMAGES)
    again = PassManager("equalize").run(after, Task(calibration=[IMAGES]))
    assert not again.records[0].changed
    save(after, tmp_path / "m.pt2")
    loaded = PassManager("equalize").run(load(tmp_path / "m.pt2"), Task(calibration=[IMAGES]))
    assert not loaded.records[0].changed


def test_dead_channels_stay():
    model = spread(nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1)))
    with torch.no_grad():
        model[0].weight[2], model[0].bias[2] = 0, -1
        model[2].weight[:, 3] = 0
    before = trace(model, IMAGES)
    after = PassManager("equalize").run(before, Task(calibration=[IMAGES])).program
    new = after.graph_module.get_parameter("0.weight")
    assert torch.equal(new[2:4], model[0].weight[2:4])
    assert bool(torch.isfinite(new).all())


def test_int8_errs_less():
    model, x = spread(Residual()).float(), IMAGES.float().repeat(8, 1, 1, 1)
    x = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    before, task = trace(model, x[:2]), Task(calibration=[x])
    errors = []
    with torch.no_grad():
        for text in ("insert-qdq{vnni=true}", "equalize,insert-qdq{vnni=true}"):
            pairs = zip(PassManager(text).run(before, task).program(x), model(x), strict=True)
            errors.append(sum(float((a - b).square().sum() / b.square().sum()) for a, b in pairs))
    assert errors[1] < 0.5 * errors[0]


def test_an_equalized_model_that_is_quantized_is_refused():
    x = IMAGES.float().repeat(2, 1, 1, 1)
    before = trace(nn.Conv2d(3, 4, 1).eval(), x)
    program = PassManager("insert-qdq").run(before, Task(calibration=[x])).program
    (record,) = PassManager("equalize").run(program).records
    assert [refusal.code for refusal in record.result.refusals] == ["quantized"]


def test_bad_batches():
    model = spread(nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1)))
    with pytest.raises(InputError, match="equalize needs calibration batches"):
        PassManager("equalize").run(trace(model, IMAGES))
    with pytest.raises(InputError, match="relu computes NaN or Inf on calibration batch 1"):
        PassManager("equalize").run(trace(model, IMAGES), Task(calibration=[IMAGES, IMAGES * torch.nan]))
    with pytest.raises(InputError, match="batches must be at least 1"):
        Equalize(batches=0)
