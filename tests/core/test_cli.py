"""The command line as a user meets it: what is printed, which files are left, and which exit code."""

import json
import runpy
import signal
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

import fxcompress as fxc
from fxcompress import digits, registry
from fxcompress.cli import compress as cli_compress
from fxcompress.cli import main
from fxcompress.pipeline.recipes import RECIPES

MODELS = """
import torch
from torch import nn

def small():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return model, torch.randn(2, 3, 8, 8)
"""


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A model to name on the command line, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "my_models.py").write_text(MODELS)
    return "my_models.py:small"


@pytest.fixture
def failing(capsys):
    """Runs a command that must fail; gives its message, which is all it prints."""

    def run(*words):
        assert main(list(words)) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("fxcompress: ")
        assert "Traceback" not in err
        return err.removeprefix("fxcompress: ")

    return run


def files(folder):
    return sorted(each.name for each in folder.iterdir())


def test_built_in_task_trains_compresses_measures_and_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["compress", "--epochs", "1"]) == 0
    out = capsys.readouterr().out
    rows = {line.split("  ")[0]: line for line in out.splitlines()}
    for name in ("params", "MACs", "weights", "top-1 (validation)", "top-1 (test)"):
        assert name in rows
    assert any(f"latency ({engine}, batch 1)" in rows for engine in ("onnxruntime", "openvino", "eager"))
    assert "174.970 k" in rows["params"]
    assert "-74.9 %" in rows["params"]
    assert "folded 15" in rows["fold-batchnorm"]
    assert "layers 16" in next(line for name, line in rows.items() if name.startswith("insert-qdq"))
    assert "x as fast; medians of" in out
    folder = tmp_path / "fxcompress-out"
    assert files(folder) == ["model.onnx", "model.pt2", "report.html", "report.json"]
    assert all(f"fxcompress-out/{name}" in out for name in files(folder))
    measures = {each["name"]: each for each in json.loads((folder / "report.json").read_text())["measures"]}
    assert measures["top-1 (test)"]["after"] > measures["top-1 (test)"]["before"] - 2
    program = fxc.load(folder / "model.pt2")
    assert digits.top1(program.emit(), digits.load_digits().test) == pytest.approx(measures["top-1 (test)"]["after"])


def test_a_model_with_a_pipeline_into_a_folder(small, tmp_path, capsys):
    assert main(["compress", small, "--pipeline", "fold-batchnorm", "-o", "out"]) == 0
    out = capsys.readouterr().out
    assert files(tmp_path / "out") == ["model.onnx", "model.pt2", "report.html", "report.json"]
    assert "eliminate-dead" not in out
    assert "top-1" not in out
    again = tmp_path / "out" / "model.pt2"
    assert main(["compress", str(again), "--recipe", "default", "-o", "again"]) == 0
    assert fxc.load(tmp_path / "again" / "model.pt2")(torch.randn(3, 3, 8, 8)).shape == (3, 4)


def test_without_onnx_the_rest_is_written_and_the_remedy_is_printed(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert main(["compress", small, "-o", "out"]) == 0
    assert files(tmp_path / "out") == ["model.pt2", "report.html", "report.json"]
    assert "model.onnx is left out: " in (out := capsys.readouterr().out)
    assert 'pip install "fxcompress[onnx]"' in out


@pytest.mark.parametrize("stop_at", ["_train_epoch", "compress", "export"])
def test_ctrl_c_leaves_nothing_behind(small, tmp_path, monkeypatch, capsys, stop_at):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    model = [] if stop_at == "_train_epoch" else [small]
    monkeypatch.setattr(digits if stop_at == "_train_epoch" else cli_compress, stop_at, interrupt)
    assert main(["compress", *model, "-o", "out"]) == 130
    assert "interrupted; nothing was written" in capsys.readouterr().err
    assert "out" not in files(tmp_path)


def test_inspect_shows_layers_costs_and_shapes(small, capsys):
    assert main(["inspect", small]) == 0
    out = capsys.readouterr().out
    assert "my_models.py:small: 120 params, 3.89 k MACs, 520 B weights" in out
    assert "float32 (batch, 3, 8, 8)" in out
    assert [line.split()[1] for line in out.splitlines() if line.startswith(("0", "1"))] == ["Conv2d", "BatchNorm2d"]


def test_inspect_graph_prints_the_program(small, capsys):
    assert main(["inspect", small, "--graph"]) == 0
    expected = fxc.trace(*_small_model(small)).text()
    assert capsys.readouterr().out.rstrip("\n") == expected.rstrip("\n")


def _small_model(reference):
    from fxcompress.cli.models import load_model

    found = load_model(reference)
    return found.model, found.example_inputs


def test_no_line_is_wider_than_the_terminal(small, monkeypatch, capsys):
    for command in (["passes"], ["inspect", small], ["bench", small, "--rounds", "1"]):
        assert main(command) == 0
        widths = [len(line) for line in capsys.readouterr().out.splitlines() if not line.startswith("'fxcompress")]
        assert max(widths) <= 80


def test_passes_lists_every_pass_and_recipe(capsys):
    assert main(["passes"]) == 0
    first_words = {line.split()[0].partition("{")[0] for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert first_words >= {*registry.names(), *RECIPES}


@pytest.mark.parametrize("name", registry.BUILT_IN)
def test_passes_explains_each(name, capsys):
    assert main(["passes", name]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{name} (")
    entry = next(entry for entry in registry.catalog() if entry.name == name)
    assert entry.summary.replace("``", "") in " ".join(out.split())
    assert all(option.name in out for option in entry.options)


def test_bench_prints_speed_beside_fidelity_and_how_to_install_what_is_missing(small, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert main(["bench", small, "--rounds", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("my_models.py:small, batch 1, ")
    assert lines[1].split() == ["engine", "latency", "spread", "vs", "eager", "size", "max", "rel", "error", "SQNR"]
    assert [line.split()[0] for line in lines[3:5]] == ["eager", "onnxruntime"]
    assert "1.00x" in lines[3]
    assert "bit-equal" in lines[3]
    assert lines[5].startswith("openvino: ")
    assert 'pip install "fxcompress[openvino]"' in lines[5]


def test_wrong_model_pass_option_and_recipe(failing):
    assert "torchvision has no model 'resnet81'; did you mean 'resnet18'" in failing("inspect", "torchvision:resnet81")
    assert "there is no pass 'csot'; did you mean 'cost'" in failing("passes", "csot")
    assert "no recipe 'defualt'; did you mean 'default'" in failing("compress", "--recipe", "defualt")
    assert "unknown pass 'fold-batchnrom'; did you mean 'fold-batchnorm'" in failing(
        "compress", "--pipeline", "eliminate-dead,fold-batchnrom"
    )
    assert "'eliminate-dead' has no option 'deep'" in failing("compress", "--pipeline", "eliminate-dead{deep=1}")
    assert "the pipeline is empty" in failing("compress", "--pipeline", "")


def test_options_that_do_not_go_together(failing, small):
    assert "--epochs is for the built-in task" in failing("compress", small, "--epochs", "3")
    assert "--input is for a MODEL" in failing("compress", "--input", "3x8x8")
    assert "give --batch at least 1" in failing("compress", "--batch", "0")
    assert "cannot train for 0 epochs" in failing("compress", "--epochs", "0", "-o", "out")


def test_an_unwritable_folder_is_found_before_any_work(failing, small, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(digits, "train", lambda *args, **kwargs: pytest.fail("trained"))
    assert "cannot write into file/out" in failing("compress", "-o", "file/out")


def test_a_missing_extra_says_what_to_install(failing, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert 'pip install "fxcompress[demo]"' in failing("compress", "-o", str(tmp_path / "out"))
    assert files(tmp_path) == []


def test_debug_shows_where_an_error_comes_from():
    with pytest.raises(fxc.InputError, match="there is no pass 'csot'"):
        main(["passes", "csot", "--debug"])


def test_wrong_use_exits_with_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["compress", "--pipeline", "cost", "--recipe", "default"])
    assert stopped.value.code == 2
    assert "not allowed with argument" in capsys.readouterr().err


def test_the_module_runs_as_a_program(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fxcompress", "--version"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("fxcompress", run_name="__main__")
    assert stopped.value.code == 0
    assert capsys.readouterr() == (f"fxcompress {version('fxcompress')}\n", "")


def test_ctrl_c_while_libraries_are_imported_shows_no_traceback(tmp_path):
    (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import fxcompress_launcher as f; f.main()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"importing\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == b""
    assert process.returncode == -signal.SIGINT
