"""Folds batch normalization into the layer before or after it (Jacob et al. 2018, arXiv:1712.05877, section 3.2).

With settled statistics, batch norm scales and shifts each channel c:

    bn(x)_c = s_c x_c + t_c,   s_c = gamma_c / sqrt(var_c + eps),   t_c = beta_c - mean_c s_c

After a convolution or linear layer y = W x + b, the output channels o take it up:

    W'_o = s_o W_o,   b'_o = s_o b_o + t_o

Before one, the input channels i do, with a sum over kernel taps k:

    W'_oi = W_oi s_i,   b'_o = b_o + sum_i sum_k W_oik t_i

The second form needs every output to see every tap on real input: with zero padding the border sees 0 in place of t_i,
and in a transposed convolution the taps that an output sees depend on its place. There it is exact only if t is 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxcompress.ir.dead_code import drop_unread_state, eliminate_dead
from fxcompress.ir.ops import Operation, operation, readers
from fxcompress.ir.program import Program
from fxcompress.ir.weighted import WeightedLayer, put_weight, weighted_layers
from fxcompress.pass_base import Guarantee, PassResult, Refusal, Transform
from fxcompress.task import Task

aten = torch.ops.aten


@dataclass(frozen=True)
class FoldBatchnorm(Transform):
    """Folds batch normalization into the convolution or linear layer before it, or else into those after it.

    Refuses, naming the batch norm: ``batch-statistics``, ``computed-weight``, ``shared-weight``, ``extra-users``,
    ``channel-dim``, ``zero-padding``, ``not-finite``.
    """

    name: ClassVar[str] = "fold-batchnorm"
    guarantee: ClassVar[Guarantee] = "exact"

    def run(self, program: Program, task: Task | None) -> PassResult:
        """Counts the batch norms ``folded``."""
        shared = {tensor for tensor, calls in readers(program.graph_module).items() if len(calls) > 1}
        refusals: list[Refusal] = []
        folded = 0
        for node in list(program.nodes):
            norm = operation(program.graph_module, node)
            if norm is None or norm.overload is not aten.batch_norm.default:
                continue
            refused = _fold(program.graph_module, norm, shared)
            refusals += refused or ()
            folded += refused is None
        if folded:
            eliminate_dead(program.graph)
            drop_unread_state(program.graph_module)
        return PassResult(bool(folded), tuple(refusals), {"folded": folded})


def scale_and_shift(norm: Operation) -> tuple[torch.Tensor, torch.Tensor]:
    """The s and t of a batch norm with settled statistics, in float64, one value per channel."""
    scale = torch.rsqrt(norm["running_var"].detach().double() + norm["eps"])
    if norm["weight"] is not None:
        scale = scale * norm["weight"].detach().double()
    shift = -norm["running_mean"].detach().double() * scale
    return scale, shift if norm["bias"] is None else shift + norm["bias"].detach().double()


def _fold(graph_module: fx.GraphModule, norm: Operation, shared: Collection[int]) -> list[Refusal] | None:
    """Folds one batch norm; gives why not, with an empty list when no layer stands beside it."""
    refusals = []
    for match in _matches(graph_module, norm):
        objection = next(match.objections(shared), None)
        if objection is None:
            weights = [(layer, *match.folded(layer)) for layer in match.layers]
            if all(tensor.is_meta or bool(torch.isfinite(tensor).all()) for _, *pair in weights for tensor in pair):
                for layer, weight, bias in weights:
                    put_weight(graph_module, layer, weight, bias)
                norm.node.replace_all_uses_with(norm["input"])
                graph_module.graph.erase_node(norm.node)
                return None
            objection = "not-finite", "the folded weights overflow; check the batch norm's statistics"
        refusals.append(Refusal(objection[0], norm.node.name, objection[1]))
    return refusals


def _matches(graph_module: fx.GraphModule, norm: Operation) -> Iterator[_Match]:
    source = norm.operands.get("input")
    producers = weighted_layers(graph_module, [source] if source is not None else [])
    if producers:
        yield _IntoProducer(norm, producers, producers[0].node)
    consumers = weighted_layers(graph_module, norm.node.users)
    if consumers:
        yield _IntoConsumers(norm, consumers, norm.node)


@dataclass(frozen=True)
class _Match(ABC):
    """A batch norm, the layers that would take it up, and the node whose value goes from one to the other."""

    norm: Operation
    layers: tuple[WeightedLayer, ...]
    between: fx.Node

    @abstractmethod
    def folded(self, layer: WeightedLayer) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight and bias that a layer gets."""

    def objections(self, shared: Collection[int]) -> Iterator[tuple[str, str]]:
        """Codes and reasons why the rewrite is not safe; the first one counts."""
        if self.norm["training"] or self.norm["running_mean"] is None:
            yield "batch-statistics", "it normalizes with statistics of the batch; let it keep running statistics"
        for call in (self.norm, *(layer.operation for layer in self.layers)):
            computed = sorted(name for name in call.operands if name != "input")
            if computed:
                yield "computed-weight", f"the {computed[0]} of {call.node.name} is computed in the graph"
        for layer in self.layers:
            if any(id(layer.operation[name]) in shared for name in layer.operation.state):
                yield "shared-weight", f"{layer.node.name} shares its weight with another call; give each its own"
            if layer.layout.channel_dim(self.between.meta["val"].dim()) != 1:
                yield "channel-dim", f"the channels of {layer.node.name} are not dim 1, which the batch norm works on"
        others = set(self.between.users) - {self.norm.node, *(layer.node for layer in self.layers)}
        if others:
            other = min(other.name for other in others)
            yield "extra-users", f"{self.between.name} is also read by {other}, which would get another value"


class _IntoProducer(_Match):
    def folded(self, layer: WeightedLayer) -> tuple[torch.Tensor, torch.Tensor]:
        return layer.scaled_outputs(*scale_and_shift(self.norm))


class _IntoConsumers(_Match):
    def folded(self, layer: WeightedLayer) -> tuple[torch.Tensor, torch.Tensor]:
        return layer.scaled_inputs(*scale_and_shift(self.norm))

    def objections(self, shared: Collection[int]) -> Iterator[tuple[str, str]]:
        yield from super().objections(shared)
        shift = scale_and_shift(self.norm)[1]
        moves = shift.is_meta or bool(shift.any())
        for layer in self.layers:
            if moves and not layer.sees_every_tap:
                yield "zero-padding", f"the border of {layer.node.name} sees zeros where it must see the shift"
