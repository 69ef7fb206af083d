import errno
import os

import pytest
import torch

from kdnet import writing
from kdnet.writing import (
    WriteError,
    atomic,
    atomic_folder,
    remove_abandoned,
    write_tensors,
    write_text,
)


def test_a_file_appears_only_when_it_is_complete(tmp_path):
    file = tmp_path / "deep" / "result.txt"

    def write(text, error=None):
        with atomic(file) as partial:
            partial.write_text(text)
            assert partial.suffix == ".txt"
            if error is not None:
                raise error

    with pytest.raises(RuntimeError, match="half way"):
        write("half", RuntimeError("half way"))
    assert list(file.parent.iterdir()) == []
    write("whole")
    assert file.read_text() == "whole"


def test_content_and_name_are_on_the_disk_before_the_writer_goes_on(tmp_path, monkeypatch):
    order = []
    flush, replace = writing._flush, type(tmp_path).replace
    monkeypatch.setattr(writing, "_flush", lambda path: (order.append(path.is_dir()), flush(path)))
    monkeypatch.setattr(
        type(tmp_path), "replace", lambda *paths: (order.append("renamed"), replace(*paths))
    )
    write_text(tmp_path / "file", "text")
    assert order == [False, "renamed", True]


def test_the_folder_of_a_lost_run_is_not_made_anew(tmp_path):
    with pytest.raises(WriteError, match=r"state\.pt cannot be written \(No such file"):
        write_tensors(tmp_path / "gone" / "student" / "state.pt", {})
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("unexpected pos 64 vs 0\ntrace"),
    ],
)
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, error):
    write_tensors(tmp_path / "state.pt", {"epoch": 1})

    def save(content, stream):
        stream.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(WriteError, match=r"(No space left.*|pos 64 vs 0)\). What was there"):
        write_tensors(tmp_path / "state.pt", {"epoch": 2})
    assert torch.load(tmp_path / "state.pt", weights_only=True) == {"epoch": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def test_a_folder_appears_only_when_all_its_files_are_there(tmp_path):
    def write(error=None):
        with atomic_folder(tmp_path / "case") as partial:
            (partial / "one").write_text("1")
            if error is not None:
                raise error

    with pytest.raises(KeyError):
        write(KeyError())
    assert list(tmp_path.iterdir()) == []
    write()
    write()  # a process that comes second leaves the first one's files
    assert [path.name for path in tmp_path.rglob("*")] == ["case", "one"]


def test_only_what_was_abandoned_is_removed(tmp_path):
    for name in (".a.partial.old", ".b.partial.new", ".7.old.partial", "kept"):
        (tmp_path / name).write_text("")
    (tmp_path / ".c.partial.folder").mkdir()
    for name in (".a.partial.old", ".7.old.partial", "kept", ".c.partial.folder"):
        os.utime(tmp_path / name, (0, 0))
    remove_abandoned(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.partial.new", "kept"]
