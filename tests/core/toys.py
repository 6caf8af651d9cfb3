"""A tiny Program, and passes that behave well or badly on it."""

import functools
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from fxcompress.ir.ops import get_state, set_state
from fxcompress.ir.program import Program
from fxcompress.pass_base import Analysis, PassResult, Transform
from fxcompress.tracing import trace

CHANGED, UNCHANGED = PassResult(changed=True), PassResult(changed=False)


@functools.cache
def _traced() -> Program:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    return trace(model, torch.randn(3, 6))


def toy_program() -> Program:
    """Linear, ReLU, Linear, with weights that no other test sees."""
    program = _traced().copy()
    for name, tensor in list(program.graph_module.named_parameters()):
        set_state(program.graph_module, name, nn.Parameter(tensor.detach().clone()))
    return program


def weight(program: Program, name: str = "0.weight") -> torch.Tensor:
    return get_state(program.graph_module, name)


def put_weight(program: Program, factor: float, name: str = "0.weight") -> None:
    set_state(program.graph_module, name, nn.Parameter(weight(program, name).detach() * factor))


@dataclass(frozen=True)
class CountNodes(Analysis[int]):
    """Counts nodes."""

    name: ClassVar[str] = "count-nodes"
    runs: ClassVar[list[str]] = []

    def run(self, program, task):
        self.runs.append(self.name)
        return len(list(program.nodes))


@dataclass(frozen=True)
class WeightNorm(Analysis[tuple[torch.Tensor, ...]]):
    """Norms of the weights.

    Attributes:
        order: Which norm.
    """

    name: ClassVar[str] = "weight-norm"
    requires: ClassVar[tuple[str, ...]] = ("count-nodes",)
    runs: ClassVar[list[str]] = []
    order: float = 2.0

    def run(self, program, task):
        self.runs.append(self.name)
        return tuple(p.detach().norm(self.order) for p in program.graph_module.parameters())


@dataclass(frozen=True)
class WritingAnalysis(Analysis[int]):
    """Changes what it should only read."""

    name: ClassVar[str] = "writing-analysis"

    def run(self, program, task):
        put_weight(program, 2.0)
        return 0


@dataclass(frozen=True)
class Scale(Transform):
    """Multiplies a weight.

    Attributes:
        factor: What it is multiplied with; 1 leaves
            it as it is.
        names: The weights.
    """

    name: ClassVar[str] = "scale"
    guarantee: ClassVar = "lossy"
    preserves: ClassVar[tuple[str, ...]] = ("count-nodes",)
    factor: float = 2.0
    names: tuple[str, ...] = ("0.weight",)

    def run(self, program, task):
        if self.factor == 1:
            return UNCHANGED
        for name in self.names:
            put_weight(program, self.factor, name)
        return PassResult(changed=True, statistics={"scaled": len(self.names)})


@dataclass(frozen=True)
class Nothing(Transform):
    """Does nothing and says so."""

    name: ClassVar[str] = "nothing"
    guarantee: ClassVar = "exact"
    requires: ClassVar[tuple[str, ...]] = ("weight-norm",)

    def run(self, program, task):
        return UNCHANGED


@dataclass(frozen=True)
class HideChange(Transform):
    """Replaces a weight and says that it changed nothing."""

    name: ClassVar[str] = "hide-change"
    guarantee: ClassVar = "lossy"

    def run(self, program, task):
        put_weight(program, 2.0)
        return UNCHANGED


@dataclass(frozen=True)
class ClaimChange(Transform):
    """Says that it changed something."""

    name: ClassVar[str] = "claim-change"
    guarantee: ClassVar = "lossy"

    def run(self, program, task):
        return CHANGED


@dataclass(frozen=True)
class WriteInPlace(Transform):
    """Writes into a weight that it shares."""

    name: ClassVar[str] = "write-in-place"
    guarantee: ClassVar = "lossy"

    def run(self, program, task):
        with torch.no_grad():
            weight(program).mul_(2)
        return CHANGED


@dataclass(frozen=True)
class WriteThroughData(Transform):
    """Writes into a weight behind the version counter's back."""

    name: ClassVar[str] = "write-through-data"
    guarantee: ClassVar = "lossy"

    def run(self, program, task):
        weight(program).data.mul_(2)
        return UNCHANGED


@dataclass(frozen=True)
class NotExact(Transform):
    """Claims to be exact and moves the output a little."""

    name: ClassVar[str] = "not-exact"
    guarantee: ClassVar = "exact"

    def run(self, program, task):
        put_weight(program, 1.0001)
        return CHANGED


@dataclass(frozen=True)
class PreserveWrongly(Transform):
    """Says that weight norms survive new weights."""

    name: ClassVar[str] = "preserve-wrongly"
    guarantee: ClassVar = "lossy"
    requires: ClassVar[tuple[str, ...]] = ("weight-norm",)
    preserves: ClassVar[tuple[str, ...]] = ("weight-norm",)

    def run(self, program, task):
        put_weight(program, 2.0)
        return CHANGED


@dataclass(frozen=True)
class BreakGraph(Transform):
    """Leaves the Program out of normal form: the weight does not fit its layer."""

    name: ClassVar[str] = "break-graph"
    guarantee: ClassVar = "lossy"

    def run(self, program, task):
        set_state(program.graph_module, "0.weight", nn.Parameter(torch.zeros(5, 7)))
        return CHANGED


@dataclass(frozen=True)
class RaiseMidway(Transform):
    """Rewrites half and fails."""

    name: ClassVar[str] = "raise-midway"
    guarantee: ClassVar = "lossy"
    error: type[BaseException] = field(default=ValueError, init=False)

    def run(self, program, task):
        put_weight(program, 3.0)
        program.graph_module.delete_submodule("2")
        raise self.error("half way")


@dataclass(frozen=True)
class InterruptMidway(RaiseMidway):
    """Ctrl-C in the middle of a rewrite."""

    name: ClassVar[str] = "interrupt-midway"
    error: type[BaseException] = field(default=KeyboardInterrupt, init=False)


@dataclass(frozen=True)
class ReturnNothing(Transform):
    """Forgets its result."""

    name: ClassVar[str] = "return-nothing"
    guarantee: ClassVar = "lossy"

    def run(self, program, task):
        return None


@dataclass(frozen=True)
class SwapActivation(Transform):
    """Replaces ReLU by another function: a graph edit with recompilation left to the manager."""

    name: ClassVar[str] = "swap-activation"
    guarantee: ClassVar = "lossy"

    def run(self, program, task):
        for node in program.nodes:
            if node.target is torch.ops.aten.relu.default:
                node.target = torch.ops.aten.sigmoid.default
        return CHANGED


TOYS = (CountNodes, WeightNorm, WritingAnalysis, Scale, Nothing, PreserveWrongly, SwapActivation, RaiseMidway)
