"""Samples to calibrate on, from a file of arrays on the command line."""

import json

import numpy as np
import pytest
import torch

import fxcompress as fxc
from fxcompress.cli import main
from fxcompress.cli.calibration import calibration_batches

MODEL = """
import torch
from torch import nn

class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, image, shift):
        return self.conv(image) + shift[:, None, None, None]

class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3)), nn.Linear(8, 4)

    def forward(self, images):
        return [self.head(row) for row in self.body(images).mean((2, 3)) if row.sum() > -100]

def parts():
    return Parts(), torch.randn(2, 3, 8, 8)

def one():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)), torch.randn(2, 3, 8, 8)

def two():
    return Sum(), (torch.randn(2, 3, 8, 8), torch.randn(2))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "nets.py").write_text(MODEL)
    return tmp_path


def test_batches_of_one_input(folder):
    samples = np.random.randn(20, 3, 8, 8).astype(np.float32)
    np.save(folder / "images.npy", samples)
    assert main(["compress", "nets.py:one", "--recipe", "int8", "--calibration", "images.npy", "-o", "out"]) == 0
    passes = json.loads((folder / "out" / "report.json").read_text())["passes"]
    (inserted,) = (each for each in passes if each["text"].startswith("insert-qdq"))
    assert inserted["statistics"]["layers"] == 2
    batches = calibration_batches("images.npy")
    assert [len(batch) for batch in batches] == [16, 4]
    assert torch.equal(torch.cat(batches), torch.from_numpy(samples))


def test_parts_of_a_model_calibrate_on_what_it_calls_them_with(folder):
    np.save(folder / "images.npy", np.random.randn(20, 3, 8, 8).astype(np.float32))
    pipeline = ["--pipeline", "insert-qdq{target=onnxruntime}"]
    assert main(["compress", "nets.py:parts", *pipeline, "--calibration", "images.npy", "-o", "out"]) == 0
    (inserted,) = json.loads((folder / "out" / "report.json").read_text())["passes"]
    assert inserted["statistics"]["layers"] == 3


def test_batches_of_inputs_by_name(folder):
    arrays = {"shift": np.ones(18, np.float32), "image": np.random.randn(18, 3, 8, 8).astype(np.float32)}
    np.savez(folder / "both.npz", **arrays)
    assert main(["compress", "nets.py:two", "--pipeline", "insert-qdq", "--calibration", "both.npz", "-o", "out"]) == 0
    batches = calibration_batches("both.npz")
    assert [{name: tuple(value.shape) for name, value in batch.items()} for batch in batches] == [
        {"shift": (16,), "image": (16, 3, 8, 8)},
        {"shift": (2,), "image": (2, 3, 8, 8)},
    ]


@pytest.mark.parametrize(
    ("save", "said"),
    [
        (lambda path: None, "cannot read calibration samples from samples.npz: .*; give .npy with"),
        (lambda path: path.write_text("images"), "cannot read calibration samples from samples.npz"),
        (lambda path: path.write_bytes(b"PK\3\4 no archive"), "cannot read calibration samples from samples.npz"),
        (lambda path: np.savez(path, a=np.array([{}], object)), "cannot read .*allow_pickle"),
        (lambda path: np.savez(path, a=np.array(["x"])), "cannot read calibration samples"),
        (
            lambda path: np.savez(path, a=np.ones(3), b=np.ones(2)),
            r"\(a \(3,\), b \(2,\)\) do not have as many samples",
        ),
        (lambda path: np.savez(path, a=np.ones(())), r"\(a \(\)\) do not have as many samples each, and one at least"),
        (lambda path: np.savez(path), r"\(none\) do not have"),
    ],
)
def test_other_files_are_refused(folder, save, said):
    save(folder / "samples.npz")
    with pytest.raises(fxc.InputError, match=said):
        calibration_batches("samples.npz")


def test_without_samples_the_option_is_named(folder, capsys):
    assert main(["compress", "nets.py:one", "--recipe", "int8", "-o", "out"]) == 2
    assert "or --calibration FILE on the command line" in capsys.readouterr().err
    assert not (folder / "out").exists()
    assert main(["compress", "--calibration", "images.npy"]) == 2
    assert "--calibration is for a MODEL" in capsys.readouterr().err
