"""Checks a quantized file piece by piece: what it computes between one quantizer of activations and the next.

Rounding to a grid makes a whole step of a difference in the last bit, and deep models amplify steps as they amplify
the noise of quantization: two right files can be as far apart as that noise, in which a scale that is off by some
percent hides. So the file is cut behind its quantizers. Each piece reads what the model's quantizers give, and must
give what the model's next ones give.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from fxcompress.engines.integers import holds_state, is_call
from fxcompress.engines.names import Pieces
from fxcompress.errors import VerificationError
from fxcompress.ir.emit import output_leaves
from fxcompress.ir.program import Interface

_FLIPPED = 0.01
"""Share of a tensor that may be one step off, beside values that lie on the edge between two."""

_OF_A_STEP = 0.02
"""What is less off than this part of a step is the same integer, and what is as near to the edge may become either."""

_AT_ONCE = 2**28
"""Bytes of values after which they are compared."""


@dataclass(frozen=True, eq=False)
class Rounded:
    """A value on a grid.

    Attributes:
        value: The value, in floating point.
        step: Distance of neighbours on the grid.
        on_edge: Where it may as well have become the neighbour. After a value on a grid of its own these can be many.
    """

    value: torch.Tensor
    step: float
    on_edge: torch.Tensor


def cut_names(module: fx.GraphModule, outputs: Mapping[int, str]) -> dict[fx.Node, str]:
    """The nodes that give what quantizers of activations make, and the names that their values have in a file.

    torch.export names the k-th call of an operator ``operator_k``, the first without.

    Args:
        module: An emitted module.
        outputs: Index of a leaf of the output -> its name in the file.
    """
    calls = [node for node in _live(module.graph) if is_call(node, "dequantize_per_tensor")]
    named = {node: f"dequantize_per_tensor{f'_{index}' if index else ''}" for index, node in enumerate(calls)}
    cuts = {node: name for node, name in named.items() if _rounds(node.all_input_nodes[0])}
    leaves = output_leaves(module)
    first = {leaves[index]: name for index, name in reversed(list(outputs.items())) if leaves[index] in cuts}
    return cuts | first


def _live(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that the output depends on: torch.export drops others."""
    live: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or not live.isdisjoint(node.users):
            live.add(node)
    return [node for node in graph.nodes if node in live]


def _rounds(node: fx.Node) -> bool:
    return is_call(node, "quantize_per_tensor") and not holds_state(node)


class PieceCheck(fx.Interpreter):
    """Runs a model and, as soon as enough values are there, the pieces of a file that give the same.

    Values are held until no piece reads them any more: all at once are more than there is memory for where images are
    large. Pieces read far back along a residual stream that stays in floating point, so there they are computed anew.

    Args:
        module: An emitted module in eval mode.
        cuts: Where the file is cut; see :func:`cut_names`.
        pieces: The file.
    """

    def __init__(self, module: fx.GraphModule, cuts: Mapping[fx.Node, str], pieces: Pieces) -> None:
        super().__init__(module)
        self.extra_traceback = False  # it would be part of our messages
        self._cuts, self._pieces = cuts, pieces
        self._tensors: list[torch.Tensor] = []
        self._on_edge: dict[fx.Node, torch.Tensor] = {}
        self._unchecked: dict[str, Rounded] = {}
        self._bytes = 0
        self._held: dict[str, torch.Tensor] = {}
        self._unread = Counter(cut for read in pieces.reads.values() for cut in read)

    def outputs(self, interface: Interface, call: Any, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """What the file gives for outputs that no quantizer makes, where all before them is right.

        Args:
            interface: How the model is called.
            call: Positional and keyword inputs.
            names: The outputs.

        Raises:
            VerificationError: A piece gives something else; see :func:`check_rounded`.
        """
        args, kwargs = call
        self._tensors = [leaf for leaf in tree_leaves(call) if isinstance(leaf, torch.Tensor)]
        with torch.no_grad():
            self.run(*args, *(kwargs[name] for name in interface.names[len(args) :]))
        return self._check(names)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if _rounds(n):
            given, scale, *_ = self.fetch_args_kwargs_from_env(n)[0]
            self._on_edge[n] = ((given.double() / scale).frac().abs() - 0.5).abs() < _OF_A_STEP
        if n in self._cuts:
            step = float(self.fetch_args_kwargs_from_env(n)[0][1])
            self._unchecked[self._cuts[n]] = Rounded(value, step, self._on_edge[n.all_input_nodes[0]])
            self._bytes += value.nbytes
            if self._bytes > _AT_ONCE:
                self._check()
        for read in self.user_to_last_uses.get(n, ()):
            self._on_edge.pop(read, None)
        return value

    def _check(self, outputs: Sequence[str] = ()) -> dict[str, torch.Tensor]:
        """Compares what waits for it; gives the outputs."""
        waiting, self._unchecked, self._bytes = self._unchecked, {}, 0
        self._held |= {name: rounded.value for name, rounded in waiting.items()}
        wanted = [*(name for name in waiting if name in self._pieces.reads), *outputs]
        found = self._pieces.run(self._tensors, self._held, wanted) if wanted else {}
        check_rounded(waiting, {name: found[name] for name in wanted if name in waiting})
        self._unread.subtract(cut for name in wanted for cut in self._pieces.reads[name])
        self._held = {name: value for name, value in self._held.items() if self._unread[name] > 0}
        return {name: found[name] for name in outputs}


def check_rounded(expected: Mapping[str, Rounded], found: Mapping[str, torch.Tensor]) -> None:
    """Compares what a cut file computes with what the model computes.

    Raises:
        VerificationError: A value is more than one step off, or more of a tensor than rounding explains.
    """
    for name, value in found.items():
        reference = expected[name].value.cpu()
        if value.shape != reference.shape:
            raise VerificationError(f"{name} is {tuple(value.shape)} where {tuple(reference.shape)} is expected")
        steps = (value.double() - reference.double()).abs() / expected[name].step
        differs = steps > _OF_A_STEP
        unexplained = int((differs & ~expected[name].on_edge.cpu()).sum())
        most = float(steps.max()) if steps.numel() else 0.0
        if not most <= 1 + _OF_A_STEP or unexplained > max(1, _FLIPPED * steps.numel()):
            raise VerificationError(
                f"{name} differs from the model in {int(differs.sum())} of {steps.numel()} values, "
                f"by up to {most:.2g} steps"
            )
