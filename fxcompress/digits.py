"""The built-in task: a small residual network on scikit-learn's handwritten digits (1,797 images of 8x8 pixels).

Data: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998; it comes
with scikit-learn, so nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from fxcompress.errors import InputError, MissingExtraError
from fxcompress.task import Task
from fxcompress.tracing.untouched import seeded

EPOCHS = 24
BATCH = 64


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch normalization around a shortcut (He et al., arXiv:1512.03385)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(residual)) + self.shortcut(x))


class DigitsNet(nn.Module):
    """A residual network of 14 layers (0.18 M parameters) from images (N, 1, 8, 8) to logits (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.stages = nn.Sequential(
            ResidualBlock(16, 16, 1),
            ResidualBlock(16, 16, 1),
            ResidualBlock(16, 32, 2),
            ResidualBlock(32, 32, 1),
            ResidualBlock(32, 64, 2),
            ResidualBlock(64, 64, 1),
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.stages(self.stem(x))
        logits: torch.Tensor = self.head(features.mean((2, 3)))
        return logits


@dataclass(frozen=True, eq=False)
class Digits:
    """The data in three parts, each images (N, 1, 8, 8) in [0, 1] with labels (N,).

    Attributes:
        train: 1,197 images to train and calibrate on.
        validation: 200 images to make choices by.
        test: 400 images to report on, which no pass sees.
    """

    train: TensorDataset
    validation: TensorDataset
    test: TensorDataset

    def task(self) -> Task:
        """What passes may know: calibration and training batches, the loss, and top-1 on the validation part."""
        calibration = [batch for batch, _ in zip(DataLoader(self.train, BATCH), range(4), strict=False)]
        return Task(
            calibration=calibration,
            training=DataLoader(self.train, BATCH, shuffle=True, drop_last=True),
            loss=cross_entropy,
            evaluate=lambda module: top1(module, self.validation),
            metric="top-1 (validation) %",
        )


@dataclass(frozen=True)
class Epoch:
    """Progress of training.

    Attributes:
        number: Epochs done.
        total: Epochs planned.
        loss: Mean training loss of the epoch.
    """

    number: int
    total: int
    loss: float


def load_digits() -> Digits:
    """The digits, split by class with a fixed seed.

    Raises:
        MissingExtraError: If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "demo", "the built-in digits task") from error
    pixels, labels = load(return_X_y=True)
    images = (pixels / 16).reshape(-1, 1, 8, 8).astype("float32")
    images, test_images, labels, test_labels = train_test_split(
        images, labels, test_size=400, stratify=labels, random_state=0
    )
    train_images, val_images, train_labels, val_labels = train_test_split(
        images, labels, test_size=200, stratify=labels, random_state=0
    )
    parts = (train_images, train_labels), (val_images, val_labels), (test_images, test_labels)
    return Digits(*(TensorDataset(torch.from_numpy(x), torch.from_numpy(y)) for x, y in parts))


def train(
    data: Digits, epochs: int = EPOCHS, seed: int = 0, on_epoch: Callable[[Epoch], None] | None = None
) -> DigitsNet:
    """A network trained from scratch, the same for the same seed; about 99 % top-1 with the default epochs.

    Args:
        data: What :func:`load_digits` gives.
        epochs: Passes over the training part.
        seed: Seed of weights, order and augmentation; the caller's random state stays as it is.
        on_epoch: Called after every epoch.

    Raises:
        InputError: If ``epochs`` is less than 1.
    """
    if epochs < 1:
        raise InputError(f"cannot train for {epochs} epochs; give at least 1")
    with seeded(seed), _one_thread():
        model = DigitsNet()
        batches = DataLoader(data.train, BATCH, shuffle=True, drop_last=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=epochs * len(batches))
        for number in range(1, epochs + 1):
            loss = _train_epoch(model, batches, optimizer, schedule)
            if on_epoch is not None:
                on_epoch(Epoch(number, epochs, loss))
    return model.eval()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Images this small keep one core busy; more threads wait for each other, badly so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _train_epoch(
    model: nn.Module,
    batches: DataLoader[tuple[torch.Tensor, ...]],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> float:
    model.train()
    total = 0.0
    for images, labels in batches:
        loss = functional.cross_entropy(model(_shifted(images)), labels, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        total += loss.item()
    return total / len(batches)


def _shifted(images: torch.Tensor) -> torch.Tensor:
    """Each image moved by up to one pixel in each direction."""
    padded = functional.pad(images, (1, 1, 1, 1))
    windows = padded.unfold(2, 8, 1).unfold(3, 8, 1)  # (N, 1, 3, 3, 8, 8)
    down, right = torch.randint(3, (2, len(images)))
    return windows[torch.arange(len(images)), :, down, right]


def cross_entropy(outputs: torch.Tensor, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The loss of logits on a batch of images and labels."""
    return functional.cross_entropy(outputs, batch[1])


def top1(module: nn.Module, part: TensorDataset) -> float:
    """Percentage of images whose largest logit is that of their label."""
    images, labels = part.tensors
    with torch.no_grad():
        right = module(images).argmax(1) == labels
    return 100 * float(right.double().mean())
