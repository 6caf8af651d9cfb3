"""A small, varied slice of the zoo through the checks of ``benchmarks/coverage.py``."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

COVERAGE = Path(__file__).parents[2] / "benchmarks" / "coverage.py"

SLICE = {
    "torchvision:shufflenet_v2_x0_5": "split, concatenation and channel shuffle",
    "torchvision:googlenet": "auxiliary heads that exist only in training",
    "torchvision:ssdlite320_mobilenet_v3_large": "islands",
    "timm:levit_128s": "batch norm after linear, attention biases",
    "hf:t5": "encoder and decoder, tied embeddings, dataclass output",
    "hf:mixtral": "experts",
}


REMOVAL = {"timm:levit_128s": "batch norm after linear, attention biases", "hf:bert": "residual stream, heads"}


@pytest.mark.parametrize(
    ("checks", "model"),
    [*(("capture", model) for model in SLICE), *(("removal", model) for model in REMOVAL)],
)
def test_a_model_passes_every_check(checks, model):
    for package in ("torchvision", "timm", "transformers"):
        pytest.importorskip(package, reason="the zoo needs the extra [zoo]")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", COVERAGE, checks, "--model", model], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    row = json.loads(run.stdout.splitlines()[-1])
    assert row["ok"], row["failed"]
