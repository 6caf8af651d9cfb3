"""Small models and ways to bring them into a state that tests can tell right from wrong in."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxcompress.digits import ResidualBlock
from fxcompress.manager.pass_manager import PassManager


def settled(model, seed=0):
    """The model in float64 and eval mode, with random parameters and batch norm statistics, as after training."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()

    def fill(tensor, low, high):
        tensor.uniform_(low, high, generator=generator)

    with torch.no_grad():
        for parameter in model.parameters():
            fill(parameter, -0.5, 0.5)
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                if module.running_mean is not None:
                    fill(module.running_mean, -0.5, 0.5)
                    fill(module.running_var, 0.3, 2.0)
                if module.weight is not None:
                    fill(module.weight, 0.5, 1.5)
    return model


def inputs(*shape, seed=1):
    """A random float64 tensor."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def run_pass(item, program):
    """The Program that a pass makes, checked by the manager as every transform is, and what the pass says it did."""
    done = PassManager([item]).run(program)
    return done.program, done.records[0].result


def layer_kinds(program):
    """Class names of the called modules, in order."""
    return [
        type(program.graph_module.get_submodule(node.target)).__name__
        for node in program.nodes
        if node.op == "call_module"
    ]


class Detector(nn.Module):
    """A backbone and a head around a selection that depends on the data: it cannot be captured whole."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU())
        self.backbone.out_channels = 8
        self.scorer = nn.Conv2d(8, 1, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, images):
        found = []
        for image in images:
            features = self.backbone(image[None])
            keep = (self.scorer(features)[0, 0] > 0).nonzero()
            if len(keep) == 0:
                keep = torch.zeros(1, 2, dtype=torch.long)
            assert self.backbone.out_channels == features.shape[1]
            found.append(self.head(features[0, :, keep[:, 0], keep[:, 1]].t()))
        return found


def images(*sizes):
    """Random images of those sizes, as a detector takes them."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, *size, generator=generator) for size in sizes]


def residual_net():
    """A network of two residual blocks for images (N, 3, 8, 8)."""
    return nn.Sequential(
        ResidualBlock(3, 4, 1), ResidualBlock(4, 8, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )


def small_vit():
    """A vision transformer of one block for images (N, 3, 32, 32)."""
    import timm

    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=10, embed_dim=24)


def small_bert():
    """A BERT of one layer, with the inputs and dynamic dims of :data:`BERT_INPUTS`."""
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    return BertModel(config)


BERT_INPUTS = (
    {"input_ids": torch.randint(0, 50, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)},
    {"input_ids": (1,), "attention_mask": (1,)},
)
