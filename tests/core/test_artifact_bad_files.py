"""Artifacts from elsewhere: nothing in a file is run, and each bad file or place gives one clear error."""

import contextlib
import json
import os
import pickle
import zipfile

import pytest
import torch
from answering import Answering
from torch import nn

import fxcompress as fxc
from fxcompress.artifact import archive


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The file of a small model, to damage copies of."""
    program = fxc.trace(Answering(), torch.randn(2, 4))
    path = tmp_path_factory.mktemp("small") / "m.pt2"
    fxc.save(program, path, pipeline="fold-batchnorm", report={"layers": [1, 2]})
    return program, path


# --- no file runs code -----------------------------------------------------------------------------------------------


class Planted:
    def __reduce__(self):
        return (os.mkdir, (os.environ["FXCOMPRESS_PLANTED"],))


def rewritten(source, target, change):
    """A copy of an archive in which ``change(name, bytes)`` replaces members (``None`` drops one)."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for member in old.infolist():
            content = change(member.filename.partition("/")[2], old.read(member))
            if content is not None:
                new.writestr(member.filename, content)
    return target


def with_manifest(source, target, edit):
    """A copy of an archive whose manifest ``edit`` has changed in place."""

    def change(name, content):
        if name != f"extra/{archive.MANIFEST}":
            return content
        manifest = json.loads(content)
        edit(manifest)
        return json.dumps(manifest)

    return rewritten(source, target, change)


def test_planted_pickles_are_not_executed(small, tmp_path, monkeypatch):
    _, path = small
    planted = tmp_path / "planted"
    monkeypatch.setenv("FXCOMPRESS_PLANTED", str(planted))
    payload = pickle.dumps(Planted())

    def everywhere(name, content):
        if name.startswith(("data/sample_inputs", "data/weights/weight_")):
            return payload
        if name.endswith("weights_config.json"):
            return content.replace(b'"use_pickle": false', b'"use_pickle": true')
        return content

    bad = rewritten(path, tmp_path / "bad.pt2", everywhere)
    with pytest.raises(fxc.ArtifactError, match="are a pickle, which is never loaded"):
        fxc.load(bad)
    inputs_only = rewritten(path, tmp_path / "in.pt2", lambda n, c: payload if n.startswith("data/sample") else c)
    fxc.load(inputs_only)
    assert not planted.exists()
    with contextlib.suppress(Exception):
        torch.export.load(inputs_only)
    assert planted.exists(), "the plant is one that torch.export.load runs"


EVIL = "x'); import os; os.mkdir(os.environ['FXCOMPRESS_PLANTED']); ('"


def first(manifest, op):
    return next(node for node in manifest["graph"] if node["op"] == op)


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: first(m, "placeholder").update(name=EVIL, target=EVIL),
        lambda m: first(m, "placeholder").update(target=EVIL),
        lambda m: first(m, "call_module").update(target=EVIL),
        lambda m: first(m, "call_function").update(target="os.mkdir"),
        lambda m: first(m, "call_function").update(target="load_library.__call__.x"),
        lambda m: first(m, "call_function").update(kwargs={EVIL: 1}),
        lambda m: first(m, "placeholder")["value"].update(shape=[f"__import__('os').mkdir({EVIL!r})", 4]),
        lambda m: m["modules"][0].update({"class": "os.mkdir"}),
        lambda m: m["modules"][0].update(path=EVIL),
        lambda m: m["state"][0].update(name=EVIL, data=m["state"][0]["data"]),
        lambda m: m["interface"].update(names=[EVIL]),
        lambda m: m["state"][0].update(dtype="nn"),
        lambda m: m["graph"][0].update(op="call_method"),
    ],
)
def test_planted_code_in_the_manifest_is_refused(edit, small, tmp_path, monkeypatch):
    monkeypatch.setenv("FXCOMPRESS_PLANTED", str(tmp_path / "planted"))
    bad = with_manifest(small[1], tmp_path / "bad.pt2", edit)
    with pytest.raises(fxc.ArtifactError, match=r"bad\.pt2"):
        fxc.load(bad)
    assert not (tmp_path / "planted").exists()


# --- bad files -------------------------------------------------------------------------------------------------------


def test_missing_file(tmp_path):
    with pytest.raises(fxc.ArtifactError, match=r"there is no file .*nowhere\.pt2"):
        fxc.load(tmp_path / "nowhere.pt2")


def test_wrong_suffix(small, tmp_path):
    with pytest.raises(fxc.ArtifactError, match=r"name it 'm\.pt2'"):
        fxc.load(tmp_path / "m.onnx")
    with pytest.raises(fxc.ArtifactError, match=r"name it 'm\.pt2'"):
        fxc.save(small[0], tmp_path / "m.pth")


def test_file_that_is_no_archive(tmp_path):
    (tmp_path / "m.pt2").write_text("hello")
    with pytest.raises(fxc.ArtifactError, match=r"m\.pt2 is corrupt, truncated or no \.pt2 archive"):
        fxc.load(tmp_path / "m.pt2")


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.99])
def test_truncated_file(kept, small, tmp_path):
    content = small[1].read_bytes()
    (tmp_path / "m.pt2").write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    with pytest.raises(fxc.ArtifactError, match=r"m\.pt2 is corrupt, truncated or no \.pt2 archive"):
        fxc.load(tmp_path / "m.pt2")


def test_a_flipped_bit_in_the_weights_is_noticed(small, tmp_path):
    content = bytearray(small[1].read_bytes())
    with zipfile.ZipFile(small[1]) as file:
        member = next(name for name in file.namelist() if name.endswith("weights/weight_0"))
        weights = file.read(member)
    content[content.index(weights)] ^= 1
    (tmp_path / "m.pt2").write_bytes(content)
    with pytest.raises(fxc.ArtifactError, match="corrupt"):
        fxc.load(tmp_path / "m.pt2")


@pytest.mark.parametrize("key", ["graph", "modules", "state", "interface", "symbols", "version"])
def test_damaged_manifest(key, small, tmp_path):
    bad = with_manifest(small[1], tmp_path / "bad.pt2", lambda manifest: manifest.pop(key))
    with pytest.raises(fxc.ArtifactError, match=rf"bad\.pt2 is damaged .*{key}"):
        fxc.load(bad)


def test_foreign_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "m.pt2", "w") as file:
        file.writestr("folder/hello.txt", "hello")
    with pytest.raises(fxc.ArtifactError, match="is no fxcompress artifact"):
        fxc.load(tmp_path / "m.pt2")


def test_plain_torch_export_archive_is_named_with_the_way_in(tmp_path):
    path = tmp_path / "plain.pt2"
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.randn(2, 2),)), path)
    with pytest.raises(fxc.ArtifactError, match=r"fxcompress\.trace\(torch\.export\.load\("):
        fxc.load(path)


def test_newer_format_version(small, tmp_path):
    new = with_manifest(small[1], tmp_path / "new.pt2", lambda m: m.update(version=99, fxcompress="9.0", graph="?"))
    with pytest.raises(fxc.ArtifactError, match=r"format version 99.*fxcompress 9\.0.*Upgrade fxcompress"):
        fxc.load(new)


def test_unknown_operator(small, tmp_path):
    def edit(manifest):
        first(manifest, "call_function")["target"] = "mylib.frobnicate.default"

    bad = with_manifest(small[1], tmp_path / "bad.pt2", edit)
    with pytest.raises(fxc.ArtifactError, match=r"bad\.pt2 .*'mylib\.frobnicate\.default'.*import the package"):
        fxc.load(bad)


# --- bad places to write to ------------------------------------------------------------------------------------------


def test_missing_directory(small, tmp_path):
    with pytest.raises(fxc.ArtifactError, match=r"the directory .*nowhere does not exist"):
        fxc.save(small[0], tmp_path / "nowhere" / "m.pt2")


def test_directory_in_place_of_the_file(small, tmp_path):
    (tmp_path / "m.pt2").mkdir()
    with pytest.raises(fxc.ArtifactError, match="it is a directory"):
        fxc.save(small[0], tmp_path / "m.pt2")


def test_unwritable_directory(small, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("fxcompress.staging.tempfile.TemporaryDirectory", refuse)  # root may write anywhere
    with pytest.raises(fxc.ArtifactError, match=r"cannot write .*m\.pt2: Permission denied; choose a directory"):
        fxc.save(small[0], tmp_path / "m.pt2")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_save_leaves_the_old_file_and_nothing_else(error, small, tmp_path, monkeypatch):
    path = tmp_path / "m.pt2"
    path.write_bytes(b"old")

    def interrupted(exported, target, **kwargs):
        target.write_bytes(b"half")
        raise error

    monkeypatch.setattr(torch.export, "save", interrupted)
    with pytest.raises((KeyboardInterrupt, fxc.ArtifactError)):
        fxc.save(small[0], path)
    assert [file.name for file in tmp_path.iterdir()] == ["m.pt2"]
    assert path.read_bytes() == b"old"


def test_a_file_that_reads_back_changed_is_not_kept(small, tmp_path, monkeypatch):
    real = torch.export.save

    def corrupting(exported, target, **kwargs):
        name = next(iter(exported.state_dict))
        exported.state_dict[name].data = exported.state_dict[name] + 1
        real(exported, target, **kwargs)

    program = fxc.trace(Answering(), torch.randn(2, 4))
    before = {name: tensor.clone() for name, tensor in program.graph_module.state_dict().items()}
    monkeypatch.setattr(
        "fxcompress.artifact._exported", lambda p, f: torch.export.export(p.emit(), (torch.ones(2, 4),))
    )
    monkeypatch.setattr(torch.export, "save", corrupting)
    with pytest.raises(fxc.ArtifactError, match=r"was not written: layer\.weight reads back changed"):
        fxc.save(program, tmp_path / "m.pt2")
    assert list(tmp_path.iterdir()) == []
    assert all(torch.equal(before[name], tensor) for name, tensor in program.graph_module.state_dict().items())


# --- Programs that cannot be saved -----------------------------------------------------------------------------------


def test_meta_weights_cannot_be_saved(tmp_path):
    with torch.device("meta"):
        program = fxc.trace(Answering(), torch.empty(2, 4))
    with pytest.raises(fxc.ArtifactError, match="meta device"):
        fxc.save(program, tmp_path / "m.pt2")


def test_a_module_that_is_no_standard_layer_is_named(tmp_path):
    program = fxc.trace(Answering(), torch.randn(2, 4))
    program.graph_module.layer = nn.Bilinear(4, 4, 3)
    with pytest.raises(fxc.ArtifactError, match="'layer' is a Bilinear, which is no standard layer"):
        fxc.save(program, tmp_path / "m.pt2")


def test_what_is_no_program_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(fxc.ArtifactError, match=r"only a Program can be saved, not Linear; save Compressed\.program"):
        fxc.save(nn.Linear(2, 2), tmp_path / "m.pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("device", ["toaster", "cuda:99", 1.5])
def test_a_device_that_is_not_here_is_not_taken_for_a_damaged_file(device, small):
    with pytest.raises(fxc.InputError, match=r"nothing can be loaded to the device .* on this machine; give 'cpu'"):
        fxc.load(small[1], device=device)


def test_a_report_that_is_no_json_is_refused(small, tmp_path):
    with pytest.raises(fxc.ArtifactError, match="the report is not JSON data"):
        fxc.save(small[0], tmp_path / "m.pt2", report={"x": object()})
