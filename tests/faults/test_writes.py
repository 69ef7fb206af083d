"""No file is written but through the one function of its layer, and a full disk harms none."""

import ast
import os
import re
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from faulty_training import Samples, case, equal, network, train, weights
from invented_runs import scores_of
from kdnet import files
from kdnet.data.description import load_description
from kdnet.data.volumes import Geometry
from kdnet.evaluation.inference import write_label_map
from kdnet.evaluation.scoring import write_scores
from kdnet.files import WriteError, atomic, atomic_folder, remove_abandoned, write_text
from kdnet.training.checkpoint import load_state, read_metadata, save_model, save_state
from kdnet.training.history import read_history, write_history
from privdistill import CacheWarning, PrivilegedInput, TeacherCache

APPLICATION = Path(files.__file__).parents[1]
LIBRARY = Path(sys.modules[PrivilegedInput.__module__].__file__).parent
ALWAYS = {
    *("save_file", "savez", "savez_compressed", "savefig", "to_filename", "tofile"),
    *("write_text", "write_bytes", "writerow", "writerows", "writeheader"),
    *("rename", "move", "copyfile", "copytree", "symlink_to", "hardlink_to"),
}
ALWAYS |= {"torch.save", "nib.save", "np.save", "json.dump", "yaml.dump", "pickle.dump"}
ALWAYS |= {"shutil.copy"}
#: All functions that change files outside of a block of `atomic`, and why they may.
WRITERS = {
    ("files.py", "atomic"): "the application's helper for files",
    ("stores.py", "put"): "the library's own, with a name that nobody else has",
    ("export.py", "_write_whole"): "the helper for files that nnU-Net reads",
    ("phantom_files.py", "_write"): "into the folder that atomic_folder gives",
    ("pool.py", "_start"): "a log to which another process appends",
    ("figures.py", "_inline"): "into memory",
    ("study_tables.py", "unpaired"): "other names of columns",
    ("stats.py", "_paired"): "other names of columns",
}


def writes(call):
    """Say whether a call changes a file; a `replace` of texts has two arguments."""
    called = ast.unparse(call.func)
    owner, _, name = called.rpartition(".")
    if name == "open":
        return re.search(r"'[rbt]*[wax+][rwaxbt+]*'", ast.unparse(call)) is not None
    if owner and name == "replace":
        return len(call.args) == 1 and not call.keywords
    return bool(owner) and (name in ALWAYS or called in ALWAYS)


def gives_a_partial(statement):
    """Say whether a statement is a `with` block of `atomic` or `atomic_folder`."""
    items = statement.items if isinstance(statement, ast.With) else []
    return any(ast.unparse(i.context_expr).startswith(("atomic(", "atomic_folder(")) for i in items)


def unsafe_calls(node):
    """Calls that change files, outside of such blocks."""
    if gives_a_partial(node):
        return []
    mine = [node] if isinstance(node, ast.Call) and writes(node) else []
    return mine + [call for child in ast.iter_child_nodes(node) for call in unsafe_calls(child)]


def test_every_write_goes_through_the_helper_of_its_layer():
    found = {
        (path.name, function.name)
        for folder in (APPLICATION, LIBRARY)
        for path in folder.rglob("*.py")
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(function, ast.FunctionDef) and unsafe_calls(function)
    }
    assert found == set(WRITERS)


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
    flush, replace = files._flush, type(tmp_path).replace
    monkeypatch.setattr(files, "_flush", lambda path: (order.append(path.is_dir()), flush(path)))
    monkeypatch.setattr(
        type(tmp_path), "replace", lambda *paths: (order.append("renamed"), replace(*paths))
    )
    write_text(tmp_path / "file", "text")
    assert order == [False, "renamed", True]


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


def test_the_folder_of_a_lost_run_is_not_made_anew(tmp_path):
    with pytest.raises(WriteError, match=r"state\.safetensors cannot be written \(No such file"):
        write_text(tmp_path / "gone" / "student" / "state.safetensors", "")
    assert not (tmp_path / "gone").exists()


@contextmanager
def files_end_at(size):
    """Let every write beyond so many bytes of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def big_label_map(path):
    noise = np.random.default_rng(0).integers(0, 4, (24, 24, 24))
    geometry = Geometry(noise.shape, np.eye(4), nib.Nifti1Header(), (1.0, 1.0, 1.0))
    write_label_map(path, noise, geometry, load_description("brats2021"))


WRITES = {
    "state.safetensors": lambda path: save_state(path, {"weights": torch.randn(4000), "epoch": 1}),
    "model.safetensors": lambda path: save_model(path, network(40), case(path.parent).metadata),
    "map.nii.gz": big_label_map,
    "report.html": lambda path: write_text(path, "x" * 9000),
    "history.csv": lambda path: write_history(path, [{f"column{i}": 0.5 for i in range(900)}]),
    "scores.csv": lambda path: write_scores(path, scores()),
}


def scores():
    return scores_of("student", {f"c{number}": 0.5 for number in range(200)})


@pytest.mark.parametrize("name", WRITES)
def test_a_full_disk_is_one_message_and_the_file_stays_as_it_was(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(before := b"as it was")
    with files_end_at(2000), pytest.raises(WriteError, match=r"cannot be written .*File too large"):
        WRITES[name](path)
    assert path.read_bytes() == before
    assert [left.name for left in tmp_path.iterdir() if left.is_file()] == [name]
    WRITES[name](path)
    assert path.stat().st_size > 2000


def test_a_full_disk_costs_the_teacher_cache_entries_and_no_run(tmp_path):
    cache = TeacherCache(tmp_path)
    teacher = {"tap.x": torch.randn(1, 4000)}
    with files_end_at(2000), pytest.warns(CacheWarning, match="cannot be written"):
        cache.fetch("teacher", ["a"], torch.zeros(1, 1, 4), lambda: teacher)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


# TensorBoard writes in a thread of its own, whose error it raises a second time.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("lost", ["full", "gone"])
def test_a_run_without_room_stops_and_goes_on_from_its_last_checkpoint(tmp_path, lost):
    """The disk fills up, or the folder disappears, in the second epoch of four."""
    task = case(tmp_path / "run")
    train(whole := case(tmp_path / "whole"))

    def full(_):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(1)[1]))

    def gone(_):
        (tmp_path / "run").rename(tmp_path / "away")

    with files_end_at(resource.getrlimit(resource.RLIMIT_FSIZE)[0]), pytest.raises(WriteError):
        train(task, Samples(5, 8, {"full": full, "gone": gone}[lost]))
    if lost == "gone":
        assert not (tmp_path / "run").exists()
        (tmp_path / "away").rename(tmp_path / "run")
    assert load_state(task.folder.state)["epoch"] == 1
    assert read_metadata(task.folder.last).epoch == 1
    train(task)
    assert [row["epoch"] for row in read_history(task.folder.history)] == [1, 2, 3, 4]
    assert equal(weights(task), weights(whole))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.faults
def test_a_small_disk_that_is_really_full(tmp_path):
    """On a file system of its own, where that may be made."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = [shutil.which("mount") or "mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        task = case(disk / "run")

        def fill(_):
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
            (disk / "filler").write_bytes(b"x" * free)

        with pytest.raises(WriteError, match="No space left on device"):
            train(task, Samples(5, 8, fill))
        assert load_state(task.folder.state)["epoch"] == 1
        (disk / "filler").unlink()
        train(task)
        train(whole := case(tmp_path / "whole"))
        assert equal(weights(task), weights(whole))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
