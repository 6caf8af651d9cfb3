"""The tables that README.md shows, made from the registries and the benchmarks' results."""

import json
import re
import statistics
from pathlib import Path

from tabulate import tabulate

from fxcompress import registry
from fxcompress.engines.formats import FORMATS
from fxcompress.ir.layers import LAYERS

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def github(rows, headers):
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def passes():
    rows = [(f"`{entry.name}`", entry.kind, entry.summary) for entry in registry.catalog()]
    return github(rows, ("pass", "kind", "what it does"))


def layers():
    named = {}
    for layer in LAYERS:
        named.setdefault(layer.overload._schema.name.removeprefix("aten::"), {})[layer.module.__name__] = None
    return github([(f"`aten.{name}`", ", ".join(modules)) for name, modules in named.items()], ("operator", "module"))


def exports():
    return github(
        [(f"`{suffix}`", entry.purpose.removeprefix("Export to "), f"`[{entry.extra}]`" if entry.extra else "none")
         for suffix, entry in FORMATS.items()],
        ("suffix", "format", "extra"),
    )  # fmt: skip


def results(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def coverage():
    rows = []
    for source, members in by_source("coverage"):
        good = sum(row["ok"] for row in members)
        rest, export = (sum(row.get(key, 0.0) for row in members) for key in ("rest_s", "export_s"))
        slower = sum(row.get("rest_s", 0.0) > row.get("export_s", 0.0) for row in members)
        rows.append((source, str(len(members)), str(good), f"{rest / export:.2f}", str(slower)))
    headers = ("source", "models", "pass every check", "normalise + raise + verify, per second of export", "above 1")
    return github(rows, headers)


def by_source(name):
    """Rows of a coverage run for each source of models."""
    models = results(name)["rows"]
    for source in dict.fromkeys(row["model"].partition(":")[0] for row in models):
        yield source, [row for row in models if row["model"].startswith(source + ":")]


def removal_coverage():
    rows = []
    for source, members in by_source("removal_coverage"):
        kept = [row["macs_ratio"] for row in members if "macs_ratio" in row]
        above = sum(ratio > 0.35 for ratio in kept)
        good = sum(row["ok"] for row in members)
        peers = [row["peer_macs_ratio"] for row in members if "peer_macs_ratio" in row]
        tried = len(peers) + sum("peer_failed" in row for row in members)
        peer = (
            f"{len(peers)} of {tried}" + (f", {statistics.median(peers):.3f}" if peers else "") if tried else "not run"
        )
        rows.append((source, str(len(members)), str(good), f"{statistics.median(kept):.3f}", str(above), peer))
    headers = ("source", "models", "pass every check", "MACs left, median", "with more than 0.35",
               "Torch-Pruning: runs, MACs left")  # fmt: skip
    return github(rows, headers)


def int8_latency(name="int8_latency"):
    columns = ("network", "batch", "engine", "eager ms", "float ms", "peer ms", "ours ms", "over eager", "over float",
               "over peer", "int8 layers", "cosine")  # fmt: skip
    return github([[str(row[column]) for column in columns] for row in results(name)["rows"]], columns)


def int8_latency_vnni():
    return int8_latency("int8_latency_vnni")


def int8_fidelity(name="int8_fidelity"):
    rows = results(name)["rows"]
    models = dict.fromkeys(row["model"] for row in rows)
    found = {(row["row"], row["where"], row["model"]): row for row in rows if "error" not in row}

    def cell(*key):
        return f"{found[key]['sqnr_db']:.1f} / {found[key]['agreement']:.2f}" if key in found else "-"

    kinds = dict.fromkeys((row, where) for row, where, _ in found)
    return github([(*kind, *(cell(*kind, model) for model in models)) for kind in kinds], ("int8 by", "in", *models))


def int8_fidelity_vnni():
    return int8_fidelity("int8_fidelity_vnni")


def int8_coverage():
    """For each engine: how many models it runs in int8, and the median share of layers that it executes in integers."""
    whole = {source: len(members) for source, members in by_source("coverage")}
    rows = []
    for source, members in by_source("int8_coverage"):
        row = [source, f"{len(members)} of {whole[source]}", str(sum(row["ok"] for row in members))]
        for engine in ("onnxruntime", "openvino"):
            executed = [each for each in members if each.get(f"{engine}_executed")]
            share = statistics.median(each[f"{engine}_integer"] / each[f"{engine}_executed"] for each in executed)
            row.append(f"{len(executed)}, {share:.2f}")
        rows.append(row)
    engines = ("onnxruntime: runs, int8 layers", "OpenVINO: runs, int8 layers")
    return github(rows, ("source", "models tried", "pass every check", *engines))


def trace_time():
    columns = ("family", "depth", "nodes", "export_s", "rest_s", "ratio", "rest_ms_per_node")
    rows = [[str(row[column]) for column in columns] for row in results("trace_time")["rows"]]
    return github(rows, ("model", "depth", "nodes", "export s", "rest s", "ratio", "rest ms / node"))


def one_shot_quality():
    """At each share of MACs: ours alone / with compensate / Torch-Pruning's, each in the best of its rankings."""
    rows = results("one_shot_quality")["rows"]
    shares = sorted({row["share"] for row in rows}, reverse=True)
    peers = {"fisher": "hessian"}

    def best(tool, criterion, share, ways):
        found = [
            row["agreement"] for row in rows
            if row["tool"] == tool and row["share"] == share and criterion in (row["criterion"], "best")
            and (not ways or row["way"].split()[-1] in ways)
        ]  # fmt: skip
        return f"{max(found):.1f}" if found else "-"

    def cell(criterion, share):
        ours = [best("ours", criterion, share, [way]) for way in ("alone", "compensate")]
        return " / ".join([*ours, best("theirs", peers.get(criterion, criterion), share, [])])

    criteria = ["best", *dict.fromkeys(row["criterion"] for row in rows if row["tool"] == "ours")]
    return github(
        [(criterion, *(cell(criterion, share) for share in shares)) for criterion in criteria],
        ("criterion", *(f"{share:.0%} of MACs" for share in shares)),
    )


def removal_speed():
    headers = {
        "subject": "model", "nodes": "nodes", "ours_s": "ours s", "verified_s": "with checks s",
        "theirs_s": "Torch-Pruning s", "ratio": "times as fast", "note": "note",
    }  # fmt: skip
    models = [row for row in results("removal_speed")["rows"] if row["kind"] == "model"]
    rows = [["-" if row[column] is None else str(row[column]) for column in headers] for row in models]
    ratios = [row["ratio"] for row in models if row["ratio"]]
    above = [row["ratio_above"] for row in models if row["ratio_above"]]
    rows.append(["geometric mean", *[""] * 4, f"{statistics.geometric_mean(ratios):.1f}", ""])
    rows.append(["", *[""] * 4, f"> {statistics.geometric_mean([*ratios, *above]):.1f}", "with what did not end"])
    return github(rows, headers.values())


def removal_growth():
    rows = [row for row in results("removal_speed")["rows"] if row["kind"] == "llama"]
    columns = ("subject", "nodes", "ours_s", "ms_per_node")
    return github([[str(row[column]) for column in columns] for row in rows], ("model", "nodes", "s", "ms / node"))


_MADE = (
    passes, layers, exports, coverage, trace_time, removal_coverage, one_shot_quality, removal_speed, removal_growth,
    int8_latency, int8_latency_vnni, int8_fidelity, int8_fidelity_vnni, int8_coverage,
)  # fmt: skip
TABLES = {function.__name__: function for function in _MADE}


def rendered(text):
    """README's text with every table made anew."""
    for name, make in TABLES.items():
        pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        assert re.search(pattern, text, re.DOTALL), f"README.md has no place for the table {name!r}"
        table = make()
        text = re.sub(pattern, lambda found, table=table: f"{found[1]}{table}\n{found[2]}", text, flags=re.DOTALL)
    return text
