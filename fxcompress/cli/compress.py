"""``fxcompress compress``: from a model, or the built-in task, to a folder with the compressed model and its report."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import fx, nn

from fxcompress import digits
from fxcompress.cli.calibration import FORMS as CALIBRATION_FORMS
from fxcompress.cli.calibration import calibration_batches
from fxcompress.cli.models import LoadedModel
from fxcompress.cli.options import MODEL_HELP, add, command, loaded, parts_line, traced, traced_or_islands
from fxcompress.cli.output_folder import output_folder
from fxcompress.cli.terminal import Terminal
from fxcompress.compress import Compressed, compress
from fxcompress.engines.compile import AUTO, compile
from fxcompress.engines.export import export
from fxcompress.engines.integers import is_quantized
from fxcompress.engines.latency import Latency, measure
from fxcompress.errors import FxCompressError, InputError
from fxcompress.formatting import BYTES, counted, measured, seconds
from fxcompress.ir.program import Program
from fxcompress.pipeline.recipes import choose, recipe
from fxcompress.pipeline.text import Pipeline
from fxcompress.report import Measure, Report
from fxcompress.staging import staged
from fxcompress.task import Task
from fxcompress.tracing import PartialProgram

_BUILT_IN_RECIPE = "half-int8"
_SHOWN_REFUSALS = 8
_TRUSTED_SPREAD = 0.3
_BUSY = " (the machine is busy: measure again when it is not)"


@dataclass(frozen=True, eq=False)
class Job:
    """What is compressed.

    Attributes:
        name: Title of the report.
        model: The traced model.
        task: What passes may know of the model's job.
        test: Top-1 in percent on data that no pass sees.
    """

    name: str
    model: Program | PartialProgram
    task: Task | None = None
    test: Callable[[nn.Module], float] | None = None


@dataclass(frozen=True)
class Timing:
    """Latency of a model before and after, in turns.

    Attributes:
        engine: What ran both.
        called: With what inputs.
        before: Of the model as it was.
        after: Of the compressed model.
    """

    engine: str
    called: str
    before: Latency
    after: Latency


def add_to(commands: Any) -> None:
    """Adds the command."""
    parser = command(commands, "compress", "Compress a model and write it, with its report, into a folder", run)
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", help=f"{MODEL_HELP} (default: a network trained on scikit-learn's digits)"
    )
    passes = parser.add_mutually_exclusive_group()
    add(passes, "--pipeline", "--recipe")
    parser.add_argument(
        "-o", "--output", metavar="DIR", default="fxcompress-out", help="folder for the files (default: fxcompress-out)"
    )
    parser.add_argument(
        "--epochs", type=int, metavar="N", help=f"epochs of the built-in training (default: {digits.EPOCHS})"
    )
    parser.add_argument("--calibration", metavar="FILE", help=f"samples for passes that calibrate: {CALIBRATION_FORMS}")
    add(parser, "--batch", "--input", "--seed")


def run(options: argparse.Namespace, terminal: Terminal) -> None:
    """Compresses, measures, prints and writes."""
    pipeline = _pipeline(options)
    _check(options)
    with output_folder(options.output) as folder:
        job = _given(options, terminal) if options.model else _digits(options, terminal)
        with terminal.working(f"compressing {job.name}: {pipeline}"):
            out = compress(job.model, pipeline=pipeline, task=job.task)
        timing = _timing(out, options.batch, terminal)
        out = replace(out, report=_completed(out, job, timing))
        _show(out.report, terminal)
        terminal.line(_latency_line(timing))
        if isinstance(out.before, PartialProgram):
            terminal.line(parts_line(out.before))
        missing = _write(out, folder, terminal)
        sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    _show_files(Path(options.output), sizes, missing, terminal)


def _pipeline(options: argparse.Namespace) -> Pipeline:
    if options.pipeline is not None:
        return choose(options.pipeline)
    return recipe(options.recipe or ("default" if options.model else _BUILT_IN_RECIPE))


def _check(options: argparse.Namespace) -> None:
    """What would otherwise be found only after long work."""
    if options.batch < 1:
        raise InputError(f"cannot measure a batch of {options.batch}; give --batch at least 1")
    if options.model and options.epochs is not None:
        raise InputError("--epochs is for the built-in task; leave it out, or leave out MODEL")
    for name in ("input", "calibration"):
        if not options.model and getattr(options, name):
            raise InputError(f"--{name} is for a MODEL; leave it out, or name a model")


def _given(options: argparse.Namespace, terminal: Terminal) -> Job:
    task = Task(calibration=calibration_batches(options.calibration)) if options.calibration else None
    found = loaded(options.model, options, terminal)
    return Job(found.name, traced_or_islands(found, terminal), task)


def _digits(options: argparse.Namespace, terminal: Terminal) -> Job:
    """The built-in task."""
    data = digits.load_digits()
    epochs = digits.EPOCHS if options.epochs is None else options.epochs
    with terminal.progress("training on scikit-learn's digits", "epochs") as bar:
        bar(0, epochs)
        model = digits.train(
            data,
            epochs,
            options.seed,
            on_epoch=lambda epoch: bar(epoch.number, epoch.total, f"loss {epoch.loss:.3f}"),
        )
    found = LoadedModel(model, data.test.tensors[0][:2], "residual network on digits")
    return Job(found.name, traced(found, terminal), data.task(), lambda module: digits.top1(module, data.test))


def _timing(out: Compressed, batch: int, terminal: Terminal) -> Timing:
    before = out.before
    # The code around islands takes its inputs in a form of its own: what a row of them is, nobody says.
    args, kwargs = before.interface.resized(batch) if isinstance(before, Program) else (before.args, before.kwargs)
    engine = "eager"
    models: tuple[Callable[..., Any], Callable[..., Any]] = (before.emit(), out.model)
    if isinstance(before, Program) and isinstance(out.model, fx.GraphModule) and is_quantized(out.model):
        with terminal.working("preparing engines"):
            fastest = compile(out.model, AUTO)  # eager only emulates integers
            engine, models = fastest.engine, (compile(before, fastest.engine), fastest)
    calls = {name: partial(model, *args, **kwargs) for name, model in zip(("before", "after"), models, strict=True)}
    with terminal.progress("measuring latency", "rounds") as bar:
        found = measure(calls, on_round=bar)
    return Timing(engine, f"batch {batch}" if isinstance(before, Program) else "example inputs", **found)


def _completed(out: Compressed, job: Job, timing: Timing) -> Report:
    """The report with what the command measured."""
    measures = list(out.report.measures)
    if job.test is not None:
        measures.append(Measure("top-1 (test)", job.test(out.before.emit()), job.test(out.model), "%"))
    name = f"latency ({timing.engine}, {timing.called})"
    measures.append(Measure(name, timing.before.median * 1e3, timing.after.median * 1e3, "ms"))
    return replace(out.report, title=job.name, measures=tuple(measures))


def _latency_line(timing: Timing) -> str:
    before, after = timing.before, timing.after
    spread = max(before.spread, after.spread) / 2
    return (
        f"\nlatency: {after.speedup_over(before):.2f}x as fast; medians of {len(after.samples)} interleaved rounds, "
        f"± {100 * spread:.0f} %{_BUSY if spread > _TRUSTED_SPREAD else ''}"
    )


def _show(report: Report, terminal: Terminal) -> None:
    terminal.heading(report.title)
    terminal.table(
        ["", ">before", ">after", ">change"],
        [[row.name, *measured(row.before, row.after, row.unit)] for row in report.totals()],
    )
    terminal.line()
    terminal.table(
        ["|pass", ">time", "|did", "|error"],
        [[row.text, seconds(row.seconds), row.counts or "nothing to do", row.error] for row in report.passes],
    )
    if report.refusals:
        terminal.heading(f"\n{counted(len(report.refusals), 'refusal')}")
        for refusal in report.refusals[:_SHOWN_REFUSALS]:
            terminal.line(f"  {refusal}")
        if len(report.refusals) > _SHOWN_REFUSALS:
            terminal.line(f"  and {len(report.refusals) - _SHOWN_REFUSALS} more, in the report")


def _write(out: Compressed, folder: Path, terminal: Terminal) -> list[str]:
    """Writes all files; gives a line for each that could not be made."""
    out.report.to_html(folder / "report.html")
    with staged(folder / "report.json") as file:
        file.write_text(out.report.to_json(), encoding="utf-8")
    if isinstance(out.program, PartialProgram):
        return [
            "model.pt2 and model.onnx are left out: the model was captured in part only; save or export its islands "
            "with fxcompress.save and fxcompress.export"
        ]
    with terminal.working("writing model.pt2"):
        out.save(folder / "model.pt2")
    with terminal.working("writing and checking model.onnx"):
        try:
            export(out.program, folder / "model.onnx")
        except FxCompressError as error:  # the rest is worth having without it
            return [f"model.onnx is left out: {error}".replace(f"{folder}/", "")]
    return []


_CONTENTS = {
    "model.onnx": "for onnxruntime and other engines",
    "model.pt2": "for fxcompress.load",
    "report.html": "every layer, before and after",
    "report.json": "the same as data",
}


def _show_files(folder: Path, sizes: dict[str, int], missing: list[str], terminal: Terminal) -> None:
    terminal.line()
    width = max(len(str(folder / name)) for name in sizes)
    for name, size in sizes.items():
        terminal.line(f"{folder / name!s:{width}}  {BYTES.text(size):>9}  {_CONTENTS[name]}")
    for line in missing:
        terminal.line(line)
