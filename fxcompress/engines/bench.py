"""Benchmarks: one model on several engines, its speed beside its fidelity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch.utils._pytree import tree_flatten

from fxcompress.engines.compile import CompiledModel, check_engine, compile
from fxcompress.engines.latency import BUDGET_S, ROUNDS, Latency, measure
from fxcompress.errors import FxCompressError, InputError
from fxcompress.ir.program import Program
from fxcompress.verification.numerics import Comparison, compare_outputs

REFERENCE = "eager"


@dataclass(frozen=True)
class EngineRow:
    """One engine of a benchmark.

    Attributes:
        engine: Its name.
        latency: Seconds per call; ``None`` where it did not run.
        speedup: How many times faster than eager.
        size: Bytes of its file, or of the weights where it has none.
        fidelity: Its output against eager's; ``None`` where it did not run.
        failure: Why it did not run, and what mends it.
    """

    engine: str
    latency: Latency | None = None
    speedup: float | None = None
    size: int | None = None
    fidelity: Comparison | None = None
    failure: str = ""


def bench(
    program: Program,
    engines: Sequence[str] = (REFERENCE, "onnxruntime", "openvino"),
    *,
    batch: int = 1,
    rounds: int = ROUNDS,
    budget: float = BUDGET_S,
    on_round: Callable[[int, int], None] | None = None,
) -> list[EngineRow]:
    """Measures a model on engines in interleaved rounds; eager is always among them.

    Args:
        program: The model.
        engines: Names that :func:`fxcompress.compile` takes.
        batch: Rows of the input, made from the example inputs; those of a model with a fixed batch stay as they are.
        rounds: Rounds at most.
        budget: Seconds after which no further round starts.
        on_round: Called with the rounds done and the rounds planned.

    Raises:
        InputError: If there is no such engine, or ``batch`` or ``rounds`` is less than 1.
    """
    if batch < 1 or rounds < 1:
        raise InputError(f"cannot measure {rounds} rounds of a batch of {batch}; give at least 1 of each")
    for engine in engines:
        check_engine(engine)
    module = program.emit()
    compiled: dict[str, CompiledModel] = {}
    failures: dict[str, str] = {}
    for engine in dict.fromkeys([REFERENCE, *engines]):
        try:
            compiled[engine] = compile(module, engine)
        except FxCompressError as error:
            failures[engine] = str(error)
    args, kwargs = program.interface.resized(batch)
    expected = tree_flatten(compiled[REFERENCE](*args, **kwargs))[0]
    fidelity = {
        engine: compare_outputs(expected, tree_flatten(model(*args, **kwargs))[0]) for engine, model in compiled.items()
    }
    calls = {engine: partial(model, *args, **kwargs) for engine, model in compiled.items()}
    latency = measure(calls, rounds=rounds, budget=budget, on_round=on_round)
    return [
        EngineRow(engine, failure=failures[engine])
        if engine in failures
        else EngineRow(
            engine,
            latency[engine],
            latency[engine].speedup_over(latency[REFERENCE]),
            compiled[engine].size,
            fidelity[engine],
        )
        for engine in (*compiled, *failures)
    ]
