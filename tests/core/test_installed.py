"""The packages that engines need: one that is missing, or too old, is named with what mends it."""

import importlib.metadata
import importlib.util

import pytest
import torch
from torch import nn

import fxcompress as fxc


@pytest.fixture
def plain():
    return fxc.trace(nn.Linear(4, 2).eval(), torch.randn(2, 4))


@pytest.mark.parametrize(
    ("package", "suffix", "extra"),
    [("onnxruntime", ".onnx", "onnx"), ("openvino", ".xml", "openvino"), ("executorch", ".pte", "executorch")],
)
def test_a_missing_package_gives_the_line_that_mends_it(package, suffix, extra, plain, tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else real(name, *a))
    with pytest.raises(fxc.MissingExtraError, match=rf'{package}.*pip install "fxcompress\[{extra}\]"'):
        fxc.export(plain, tmp_path / f"m{suffix}")


@pytest.mark.parametrize(("package", "suffix"), [("onnxruntime", ".onnx"), ("openvino", ".xml")])
def test_a_package_that_is_too_old_is_named_with_the_version_that_is_not(package, suffix, plain, tmp_path, monkeypatch):
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.2" if name == package else real(name))
    with pytest.raises(
        fxc.MissingExtraError, match=rf"'{package}' in a version >=[\d.]+, and 1\.2 is installed\. Install"
    ):
        fxc.export(plain, tmp_path / f"m{suffix}")
    assert "1.2 is installed" in fxc.compile(plain, "auto").measured[package]


def test_a_package_of_another_distribution_is_taken(plain, tmp_path, monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert fxc.export(plain, tmp_path / "m.onnx").path.exists()
