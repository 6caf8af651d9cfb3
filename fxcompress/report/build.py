"""Builds a report from a Program before, a Program after, and the records of the passes between."""

from __future__ import annotations

import platform
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from types import MappingProxyType
from typing import Any, Protocol

import torch

from fxcompress.ir.program import Program
from fxcompress.manager.record import Record
from fxcompress.report.model import Report
from fxcompress.report.rows import LayerFigures, LayerRow, Measure, PassRow
from fxcompress.tracing.raising import called_path


class LayerCost(Protocol):
    """What is read of a row of the ``cost`` analysis."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def params(self) -> int: ...
    @property
    def macs(self) -> int: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def activation_bytes(self) -> int: ...
    @property
    def output_shape(self) -> Sequence[int]: ...
    @property
    def dtype(self) -> Any: ...


class CostReport(Protocol):
    """What is read of the value of the ``cost`` analysis: rows in execution order."""

    @property
    def layers(self) -> Sequence[LayerCost]: ...


def build_report(
    before: Program, after: Program, records: Iterable[Record] = (), measures: Iterable[Measure] = ()
) -> Report:
    """The report on what happened between two Programs; layers are matched by qualified name.

    Args:
        before: The Program handed to the passes.
        after: The Program they made.
        records: What the manager noted about each pass.
        measures: What was measured on both models.
    """
    passes = tuple(map(_pass_row, records))
    old: CostReport = before.analyze("cost")
    new: CostReport = after.analyze("cost")
    names = {**_layer_names(after), **_layer_names(before)}
    paths = {**_operator_paths(after), **_operator_paths(before)}
    return Report(
        title=before.name,
        layers=tuple(match_layers(old.layers, new.layers, _notes(passes, names), paths)),
        passes=passes,
        diagnostics=tuple(dict.fromkeys([*before.diagnostics, *after.diagnostics])),
        measures=tuple(measures),
        environment=environment(),
    )


def match_layers(
    before: Iterable[LayerCost],
    after: Iterable[LayerCost],
    notes: Mapping[str, str] = MappingProxyType({}),
    paths: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[LayerRow]:
    """Rows in the execution order of ``after``; a removed layer comes before the layer that followed it.

    Args:
        before: Costs of the layers before, in execution order.
        after: Costs of the layers after, in execution order.
        notes: Layer name -> note.
        paths: Layer name -> place in the tree of modules, where that is not the name.
    """
    old = {cost.name: _figures(cost) for cost in before}
    new = {cost.name: _figures(cost) for cost in after}
    position = {name: index for index, name in enumerate(old)}
    removed = deque(name for name in old if name not in new)

    def row(name: str) -> LayerRow:
        return LayerRow(name, old.get(name), new.get(name), notes.get(name, ""), paths.get(name, name))

    for name in new:
        while removed and position[removed[0]] < position.get(name, -1):
            yield row(removed.popleft())
        yield row(name)
    yield from map(row, removed)


def environment() -> dict[str, str]:
    """Versions of what makes a report, and the kind of machine."""
    return {
        "fxcompress": version("fxcompress"),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def _figures(cost: LayerCost) -> LayerFigures:
    return LayerFigures(
        params=int(cost.params),
        macs=int(cost.macs),
        weight_bytes=int(cost.weight_bytes),
        activation_bytes=int(cost.activation_bytes),
        kind=cost.kind,
        output_shape=tuple(int(size) for size in cost.output_shape),
        dtype=str(cost.dtype).removeprefix("torch."),
    )


def _pass_row(record: Record) -> PassRow:
    result = record.result
    return PassRow(
        text=record.text,
        seconds=record.seconds,
        changed=record.changed,
        statistics=record.statistics,
        refusals=tuple(result.refusals) if result is not None else (),
        comparison=record.comparison,
    )


def _layer_names(program: Program) -> dict[str, str]:
    """Node name -> the name its layer has in reports; a refusal may use either."""
    return {node.name: str(node.target) for node in program.nodes if node.op == "call_module"}


def _operator_paths(program: Program) -> dict[str, str]:
    """Node name of each operator -> the same below the module that calls it."""
    operators = [node for node in program.nodes if node.op == "call_function"]
    return {node.name: f"{called_path(node)}.{node.name}".removeprefix(".") for node in operators}


def _notes(passes: Iterable[PassRow], names: Mapping[str, str]) -> dict[str, str]:
    """Layer name -> the refusals about it."""
    found: dict[str, list[str]] = defaultdict(list)
    for row in passes:
        for refusal in row.refusals:
            found[names.get(refusal.node, refusal.node)].append(f"{row.text.partition('{')[0]}: {refusal.code}")
    return {name: "; ".join(dict.fromkeys(notes)) for name, notes in found.items()}
