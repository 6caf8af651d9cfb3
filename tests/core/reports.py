"""A small report with one row of every kind."""

import math

from fxcompress.ir.program import Diagnostic
from fxcompress.pass_base import Refusal
from fxcompress.report import LayerFigures, LayerRow, Measure, PassRow, Report
from fxcompress.verification.numerics import Comparison


def figures(kind="Conv2d", params=0, macs=0, shape=(2, 8, 4), dtype="float32"):
    return LayerFigures(
        params=params,
        macs=macs,
        weight_bytes=4 * params,
        activation_bytes=4 * math.prod(shape),
        kind=kind,
        output_shape=shape,
        dtype=dtype,
    )


def tiny_report():
    """A convolution that lost half its channels, a folded norm, an operator, and a layer that was refused."""
    return Report(
        title="Tiny",
        layers=(
            LayerRow("stem.conv", figures(params=216, macs=6912), figures(params=112, macs=3456, shape=(2, 4, 4))),
            LayerRow("stem.norm", figures("BatchNorm2d", params=16), None),
            LayerRow("relu", figures("aten.relu"), figures("aten.relu", shape=(2, 4, 4)), path="stem.relu"),
            LayerRow("scale", None, figures("Linear", params=20, macs=40, shape=(2, 4))),
            LayerRow(
                "head",
                figures("Linear", params=1_290_000, macs=2_580_000, shape=(2, 10)),
                figures("Linear", params=1_290_000, macs=2_580_000, shape=(2, 10)),
                "refused",
            ),
        ),
        passes=(
            PassRow(
                "fold-batchnorm",
                0.0384,
                True,
                {"folded": 1, "error": 0.25, "skipped": 0},
                (Refusal("shared-weight", "head", "its weight is also read by 'tail'; untie them"),),
                Comparison(1e-6, 2.5e-7, 132.04, False),
            ),
            PassRow("remove-channels{ratio=0.5}", 1.5, True, {}, (), Comparison(0.0, 0.0, math.inf, True)),
        ),
        diagnostics=(Diagnostic("training-only", "DropPath behaves differently in training", "stem.drop"),),
        measures=(
            Measure("top-1", 97.5, 97.1, "%"),
            Measure("latency", 4.2, 2.1, "ms"),
            Measure("file", 4096, None, "B"),
        ),
        environment={"torch": "2.15.0"},
    )
