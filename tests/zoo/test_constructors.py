"""Slim models against their own constructors: an oracle outside this project.

Where half of everything is a width that the model's constructor takes, a model that it builds at that width computes
with the slim weights what the slim Program does.
"""

import pytest
import torch
from models import settled

from fxcompress import PassManager, trace

RTOL = 1e-9
"""Largest difference in float64, relative to the largest output."""


def check_constructor(wide, narrow, example, pipeline="select-channels{ratio=0.5},remove-channels", **options):
    """``narrow`` with the slim weights of ``wide`` computes what the slim Program does, on inputs of another batch."""
    model = settled(wide)
    slim = PassManager(pipeline).run(trace(model, example, **options)).program.emit()
    assert sum(p.numel() for p in slim.parameters()) < 0.7 * sum(p.numel() for p in model.parameters())

    narrow = narrow.double().eval()
    narrow.load_state_dict(slim.state_dict(), strict=True)

    fresh = example if isinstance(example, dict) else {"x": example}
    fresh = {name: torch.cat([value, value.flip(-1)]) for name, value in fresh.items()}
    expected, found = (
        first(model(**fresh) if isinstance(example, dict) else model(*fresh.values())) for model in (narrow, slim)
    )
    assert expected.shape == found.shape
    assert (expected - found).abs().max() <= RTOL * expected.abs().max()
    assert expected.std() > 0


def first(output):
    """The first tensor of an output, which may be a dataclass of them."""
    return output if isinstance(output, torch.Tensor) else next(iter(output.values()))


def images(size=32):
    return torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def tokens():
    return {"input_ids": torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(1))}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def torchvision():
    return pytest.importorskip("torchvision", reason="the zoo needs the extra [zoo]").models


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="the zoo needs the extra [zoo]")


def test_resnet(torchvision):
    from torchvision.models.resnet import Bottleneck

    wide, narrow = (torchvision.ResNet(Bottleneck, [1, 2, 1, 1], 10, width_per_group=width) for width in (64, 32))
    # the constructor narrows what is inside blocks; residual streams stay
    inside = "select-channels{ratio=0 ratios={*.conv1.weight: 0.5 *.conv2.weight: 0.5}},remove-channels"
    check_constructor(wide, narrow, images(), inside)


def test_resnext(torchvision):
    """Groups go as a whole, and so do the channels that each is wide."""
    from torchvision.models.resnet import Bottleneck

    wide, narrow = (
        torchvision.ResNet(Bottleneck, [1, 1, 1, 1], 10, groups=groups, width_per_group=16) for groups in (8, 4)
    )
    inside = "select-channels{ratio=0 ratios={*.conv2.weight: 0.5} factors=outer},remove-channels"
    check_constructor(wide, narrow, images(), inside)


def test_densenet(torchvision):
    wide, narrow = (
        torchvision.DenseNet(growth_rate=8 * n, block_config=(2, 3), num_init_features=16 * n, num_classes=10)
        for n in (2, 1)
    )
    check_constructor(wide, narrow, images())


def test_mobilenet_v2(torchvision):
    wide, narrow = (torchvision.MobileNetV2(10, width_mult=width, round_nearest=1) for width in (1.0, 0.5))
    narrow.classifier[1] = torch.nn.Linear(640, 10)  # the constructor does not narrow its last layer
    narrow.features[-1] = type(narrow.features[-1])(160, 640, kernel_size=1, activation_layer=torch.nn.ReLU6)
    check_constructor(wide, narrow, images())


def test_vit(torchvision):
    wide, narrow = (
        torchvision.VisionTransformer(32, 8, 2, heads, heads * 16, heads * 64, num_classes=10) for heads in (4, 2)
    )
    check_constructor(wide, narrow, images(), "select-channels{ratio=0.5 factors=outer},remove-channels")


def test_convnext(torchvision):
    from torchvision.models.convnext import CNBlockConfig

    wide, narrow = (
        torchvision.ConvNeXt([CNBlockConfig(n, 2 * n, 2), CNBlockConfig(2 * n, None, 1)], num_classes=10)
        for n in (16, 8)
    )
    check_constructor(wide, narrow, images())


def test_bert(transformers):
    def bert(heads):
        config = transformers.BertConfig(
            vocab_size=50, hidden_size=8 * heads, num_hidden_layers=2, num_attention_heads=heads,
            intermediate_size=32 * heads, num_labels=5,
        )  # fmt: skip
        return transformers.BertForSequenceClassification(config)

    check_constructor(bert(4), bert(2), tokens(), "select-channels{ratio=0.5 factors=outer},remove-channels")


def test_llama(transformers):
    """Grouped-query attention: key and value heads go with the query heads that read them."""

    def llama(heads):
        config = transformers.LlamaConfig(
            vocab_size=50, hidden_size=16 * heads, num_hidden_layers=2, num_attention_heads=2 * heads,
            num_key_value_heads=heads, head_dim=8, intermediate_size=32 * heads, use_cache=False,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config)

    check_constructor(llama(4), llama(2), tokens(), "select-channels{ratio=0.5 factors=outer},remove-channels")
