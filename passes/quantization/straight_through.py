"""Gradients through integers: rounding passes them on as if it did nothing.

The straight-through estimator of Bengio et al. (2013, arXiv:1308.3432), which quantization-aware training rests on
(Jacob et al. 2018, arXiv:1712.05877).
"""

from __future__ import annotations

from typing import Any

import torch
from fxcompress.passes.quantization.nodes import is_quantization
from torch import fx


class StraightThrough(fx.Interpreter):
    """Runs a graph with its Q/DQ nodes; what goes through a pair of them has the gradient of what comes out."""

    def __init__(self, root: fx.GraphModule) -> None:
        super().__init__(root)
        self._real: dict[fx.Node, torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        source = n.args[0] if n.args and is_quantization(n) else None
        if not isinstance(source, fx.Node):
            return super().run_node(n)
        with torch.no_grad():
            value = super().run_node(n)
        if source in self._real:
            real = self._real[source]
            return real + (value - real).detach()
        if isinstance(value, torch.Tensor):
            self._real[n] = self.env[source]
        return value
