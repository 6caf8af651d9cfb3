"""Models with data-dependent control flow: the parts that can be captured are, the rest stays in Python."""

import pytest
import torch
from models import Detector, images
from torch import nn

import fxcompress as fxc


@pytest.fixture
def detector():
    torch.manual_seed(0)
    return Detector().eval()


def test_whole_capture_says_how_to_go_on(detector):
    with pytest.raises(fxc.CaptureError, match="trace_islands"):
        fxc.trace(detector, (images((16, 16)),))


def test_islands_give_the_same_detections_also_for_other_sizes(detector):
    partial = fxc.trace_islands(detector, (images((16, 16), (20, 24)),))
    assert set(partial.islands) == {"backbone", "scorer", "head"}
    emitted = partial.emit()
    assert isinstance(emitted.backbone, torch.fx.GraphModule)
    assert set(emitted.state_dict()) == set(detector.state_dict())
    others = images((32, 18), (11, 40), (16, 16))
    for expected, found in zip(detector(others), emitted(others), strict=True):
        assert torch.equal(expected, found)


def test_islands_train(detector):
    emitted = fxc.trace_islands(detector, (images((16, 16)),)).emit().train()
    sum(part.sum() for part in emitted(images((16, 16), (16, 16)))).backward()
    assert all(parameter.grad is not None for parameter in emitted.backbone.parameters())
    assert not torch.equal(
        emitted.backbone[1].running_mean
        if hasattr(emitted.backbone, "__getitem__")
        else emitted.backbone.get_submodule("1").running_mean,
        detector.backbone[1].running_mean,
    )


def test_what_was_left_in_python_is_named(detector):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = detector, nn.Linear(4, 4)

        def forward(self, images):
            return [self.second(part) for part in self.first(images)]

    partial = fxc.trace_islands(Two().eval(), (images((16, 16)),))
    assert set(partial.islands) == {"first.backbone", "first.scorer", "first.head", "second"}
    assert [(d.code, d.path) for d in partial.diagnostics] == [("left-in-python", "first")]


def test_repr_names_the_islands(detector):
    partial = fxc.trace_islands(detector, (images((16, 16)),))
    assert repr(partial) == (
        "PartialProgram(Detector: 3 islands: backbone (3 operations, 240 parameters), "
        "scorer (1 operation, 9 parameters), head (1 operation, 36 parameters))"
    )


def test_islands_can_be_compressed(detector):
    partial = fxc.trace_islands(detector, (images((16, 16)),))
    manager = fxc.PassManager("fold-batchnorm")
    slim = partial.with_islands({path: manager.run(island).program for path, island in partial.islands.items()})
    emitted = slim.emit()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in emitted.modules())
    for expected, found in zip(detector(images((24, 24))), emitted(images((24, 24))), strict=True):
        assert torch.allclose(expected, found, atol=1e-5)


def test_islands_of_another_model_are_refused(detector):
    partial = fxc.trace_islands(detector, (images((16, 16)),))
    with pytest.raises(fxc.InputError, match="backbone"):
        partial.with_islands({})


def test_the_model_is_left_alone(detector):
    detector.train()
    detector.scorer.eval()
    modes = [module.training for module in detector.modules()]
    state = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    partial = fxc.trace_islands(detector, (images((16, 16)),))
    partial.emit().train()(images((16, 16)))
    assert [module.training for module in detector.modules()] == modes
    assert all(torch.equal(state[name], tensor) for name, tensor in detector.state_dict().items())
    assert not any(module._forward_hooks for module in detector.modules())


def test_nothing_to_capture_is_an_error():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return x * self.scale if x.sum() > 0 else x

    with pytest.raises(fxc.CaptureError, match="no part of Branches"):
        fxc.trace_islands(Branches(), torch.randn(2, 3))


def test_a_failing_model_is_an_input_error(detector):
    with pytest.raises(fxc.InputError, match="itself fails"):
        fxc.trace_islands(detector, (images((1, 1)),))


def test_a_submodule_that_is_called_in_two_ways_stays_in_python():
    class Flexible(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x, scale=None):
            return self.inner(x) if scale is None else self.inner(x) * scale

    class Host(nn.Module):
        def __init__(self):
            super().__init__()
            self.flexible = Flexible()

        def forward(self, x):
            return self.flexible(self.flexible(x), 2.0)

    partial = fxc.trace_islands(Host(), torch.randn(2, 4))
    assert set(partial.islands) == {"flexible.inner"}
    (left,) = partial.diagnostics
    assert "called in more than one way" in left.message


def test_weights_tied_across_islands_stay_tied():
    class Host(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.left = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.left.weight = self.first.weight

        def forward(self, x):
            y = self.second(self.first(x))
            return nn.functional.linear(y, self.left.weight) if float(y.sum()) < 1e9 else y

    emitted = fxc.trace_islands(Host(), torch.randn(2, 4)).emit()
    assert emitted.first.weight is emitted.second.weight is emitted.left.weight


def test_a_part_that_gives_an_object_stays_in_python():
    class Box:
        def __init__(self, value):
            self.value = value

    class Boxed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return Box(self.inner(x))

    class Host(nn.Module):
        def __init__(self):
            super().__init__()
            self.boxed = Boxed()

        def forward(self, x):
            return self.boxed(x).value

    assert set(fxc.trace_islands(Host(), torch.randn(2, 4)).islands) == {"boxed.inner"}
