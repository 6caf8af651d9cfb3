import pytest

from fxcompress.cli.output_folder import output_folder
from fxcompress.errors import ArtifactError


def names(folder):
    return sorted(each.name for each in folder.iterdir())


def test_files_appear_when_the_block_ends(tmp_path):
    target = tmp_path / "deep" / "out"
    with output_folder(target) as folder:
        (folder / "a.txt").write_text("new")
        assert not (target / "a.txt").exists()
    assert names(target) == ["a.txt"]


def write_and_stop(target, stop):
    with output_folder(target) as folder:
        (folder / "a.txt").write_text("new")
        raise stop


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ArtifactError])
def test_a_block_that_stops_leaves_everything_as_it_was(tmp_path, stop):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(stop):
        write_and_stop(tmp_path, stop)
    assert names(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_a_block_that_stops_leaves_no_new_folder(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_and_stop(tmp_path / "deep" / "out", KeyboardInterrupt)
    assert names(tmp_path) == []


def test_what_was_there_stays_beside_the_new(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "a.txt").write_text("old")
    with output_folder(tmp_path) as folder:
        (folder / "a.txt").write_text("new")
    assert names(tmp_path) == ["a.txt", "mine.txt"]
    assert (tmp_path / "a.txt").read_text() == "new"


def test_a_file_in_the_way_is_found_before_the_block_runs(tmp_path):
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(ArtifactError, match=r"cannot write into .*; choose another folder with -o"):
            write_and_stop(target, AssertionError("the block ran"))


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(ArtifactError, match=r"cannot write into .*directory"), output_folder(tmp_path) as folder:
        (folder / "a.txt").write_text("new")
    assert names(tmp_path) == ["a.txt"]
