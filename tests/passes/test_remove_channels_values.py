"""remove-channels around values of other kinds: discrete outputs, random numbers, complex weights, stepped writes."""

import pytest
import torch
from models import inputs, settled
from pruning import Wire, prune, shapes
from torch import nn

from fxcompress import PassManager, VerificationError, trace
from fxcompress.manager.instruments import Oracle, Verify

TOKENS = inputs(2, 5, 6)


def between(function, **layers):
    """A function of 8 channels of each token between two linear layers."""
    return Wire(lambda m, x: m.head(function(m, m.stem(x))), stem=nn.Linear(6, 8), **layers, head=nn.Linear(8, 4))


@pytest.mark.parametrize("discrete", [lambda y: y.argmax(-1), lambda y: y.topk(2)[1], lambda y: y > 0])
def test_outputs_that_are_classes_may_change(discrete):
    def forward(m, x):
        logits = m.head(m.stem(x))
        return logits, discrete(logits)

    model = Wire(forward, stem=nn.Linear(6, 8), head=nn.Linear(8, 4))
    done = PassManager("select-channels{ratio=0.75},remove-channels").run(trace(settled(model), TOKENS))
    assert shapes(done.program) == {"stem": (2, 6), "head": (4, 2)}
    comparison = done.records[-1].comparison
    assert 0 < comparison.discrete_changed <= 1
    assert f"{comparison.discrete_changed:.1%} of discrete outputs changed" in str(comparison)


def test_classes_that_the_masked_model_does_not_give_are_an_error(monkeypatch):
    model = Wire(lambda m, x: m.head(m.stem(x)).argmax(-1), stem=nn.Linear(6, 8), head=nn.Linear(8, 4))
    before = trace(settled(model), TOKENS)
    wrong = torch.full((2, 5), 9)
    monkeypatch.setattr("fxcompress.verification.oracle.run", lambda program, leaves: [wrong[: len(leaves[0])]])
    with pytest.raises(VerificationError, match=r"output 0 \(torch.int64\) differs in 10 of 10 elements"):
        PassManager("select-channels{ratio=0.5},remove-channels", instruments=[Verify(), Oracle()]).run(before)


@pytest.mark.parametrize("draw", [torch.randn_like, torch.rand_like, lambda x: torch.bernoulli(x.sigmoid())])
def test_noise_is_drawn_for_what_is_left(draw):
    """A variational autoencoder that samples (arXiv:1312.6114)."""

    def sample(m, x):
        mean, spread = m.coder(x).chunk(2, -1)
        return mean + spread.exp() * draw(mean)

    after = prune(between(sample, coder=nn.Linear(8, 16)), TOKENS)

    assert shapes(after) == {"stem": (4, 6), "coder": (8, 4), "head": (4, 4)}


@pytest.mark.parametrize("draw", [torch.rand, torch.randn])
def test_noise_of_a_size_that_is_written_down_keeps_what_reads_it(draw):
    after = prune(between(lambda m, x: x + m.noise(draw(x.shape[0], 5, 8).to(x.dtype)), noise=nn.Linear(8, 8)), TOKENS)

    assert shapes(after) == {"stem": (4, 6), "noise": (4, 8), "head": (4, 4)}


def test_tensors_made_of_the_default_dtype():
    model = Wire(lambda m, x: m.head(m.stem(x) + m.bias(torch.full((x.shape[0], 5, 3), 0.3))), stem=nn.Linear(6, 8),
                 bias=nn.Linear(3, 8), head=nn.Linear(8, 4)).float()  # fmt: skip
    done = PassManager("select-channels{ratio=0.5},remove-channels").run(trace(model.eval(), TOKENS.float()))

    assert shapes(done.program)["head"] == (4, 4)


def interleaved(m, x):
    found = torch.zeros_like(x)
    found[..., ::2], found[..., 1::2] = x[..., :4], x[..., 4:]
    return found


def doubled(m, x):
    found = x.clone()
    found[..., ::2] = found[..., ::2] * 2
    return found


def test_every_second_channel_may_be_written():
    assert shapes(prune(between(doubled), TOKENS)) == {"stem": (4, 6), "head": (4, 4)}
    left = shapes(prune(between(interleaved), TOKENS))
    assert left["head"][1] == left["stem"][0] < 8


@pytest.mark.parametrize("criterion", ["l1", "l2", "lamp", "fpgm", "random"])
def test_complex_weights(criterion):
    """A layer in the frequency domain, as Fourier neural operators have them (arXiv:2010.08895)."""

    def forward(m, x):
        modes = torch.fft.rfft(m.stem(x).transpose(1, 2))
        return m.head(torch.fft.irfft(torch.einsum("bik,iok->bok", modes, m.spectrum), n=5).transpose(1, 2))

    spectrum = nn.Parameter(torch.complex(inputs(8, 8, 3), inputs(8, 8, 3, seed=2)))
    model = Wire(forward, stem=nn.Linear(6, 8), spectrum=spectrum, head=nn.Linear(8, 4))
    pipeline = f"select-channels{{ratio=0.5 criterion={criterion}}},remove-channels"
    after = PassManager(pipeline).run(trace(settled(model), TOKENS)).program

    assert shapes(after) == {"stem": (4, 6), "spectrum": (4, 4, 3), "head": (4, 4)}


def test_a_rotary_embedding_whose_halves_are_copied_beside_each_other():
    """Complex views need the real and the imaginary part side by side in memory."""

    def rotate(m, x):
        halves = x.unflatten(-1, (2, 2, 2)).transpose(-1, -2).contiguous()
        return torch.view_as_real(torch.view_as_complex(halves) * m.angles).flatten(-3)

    angles = torch.polar(torch.ones(5, 1, 2, dtype=torch.float64), inputs(5, 1, 2))
    after = prune(between(rotate, angles=angles), TOKENS)

    assert shapes(after) == {"stem": (2, 6), "head": (4, 2)}


def test_an_image_that_has_become_one_pixel():
    """torch.export notes 1 for its size behind the norm, and before it an expression of the image's size."""
    model = Wire(
        lambda m, image: m.head(m.norm(m.body(m.stem(image).relu())).relu()),
        stem=nn.Conv2d(3, 8, 3, 2, 1), body=nn.Conv2d(8, 8, 3, 2, 1), norm=nn.BatchNorm2d(8), head=nn.Conv2d(8, 4, 1),
    )  # fmt: skip
    after = prune(model, inputs(2, 3, 4, 4), dynamic={"xs_0": (0, 2, 3)})
    assert shapes(after) == {"stem": (4, 3, 3, 3), "body": (4, 4, 3, 3), "head": (4, 4, 1, 1)}
