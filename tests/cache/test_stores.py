import os
import pickle
import subprocess
import sys
import time

import pytest
import torch

from privdistill import (
    CacheError,
    CacheWarning,
    DistillationWrapper,
    PrivilegedInput,
    SoftTargetDiceBCE,
    TeacherCache,
)
from privdistill.cache.stores import DiskStore, MemoryStore


def entry(value=1.0, length=100):
    return {"input": torch.zeros(1, 5), "tap.x": torch.full((1, length), float(value))}


def value(found):
    return None if found is None else found["tap.x"][0, 0].item()


@pytest.fixture(params=["memory", "disk"])
def store(request, tmp_path):
    def make(max_bytes=None):
        if request.param == "memory":
            return MemoryStore(max_bytes)
        return DiskStore(tmp_path / "cache", max_bytes)

    return make


def test_entries_come_back(store):
    kept = store()
    assert kept.put("teacher", "a", entry(3.0))
    assert value(kept.get("teacher", "a")) == 3
    assert kept.get("teacher", "b") is None
    assert kept.get("other", "a") is None


def test_a_full_store_keeps_what_it_has(store):
    kept = store(max_bytes=15_000)
    stored = [kept.put("teacher", str(i), entry(i, 1000)) for i in range(9)]
    assert stored[0]
    assert not stored[-1]
    assert value(kept.get("teacher", "0")) == 0
    assert kept.bytes <= 15_000


def age(folder, hours):
    """Make all files of a folder older than they are."""
    for path in folder.rglob("*"):
        if path.is_file():
            os.utime(path, (time.time() - hours * 3600,) * 2)


def test_entries_of_other_teachers_make_room_the_oldest_first(tmp_path):
    for number in range(2):
        DiskStore(tmp_path, None).put(f"old {number}", "a", entry(number, 500))
        age(tmp_path / f"old {number}", 8 - number)
    kept = DiskStore(tmp_path, 12_000)
    assert kept.put("new", "a", entry(3, 500))
    found = [value(kept.get(teacher, "a")) for teacher in ("old 0", "old 1", "new")]
    assert found == [None, 1, 3]
    assert kept.bytes <= 12_000


def test_entries_that_another_run_may_use_stay(tmp_path):
    first, second = (DiskStore(tmp_path, 15_000) for _ in range(2))
    for number in range(3):
        first.put("one", str(number), entry(number, 700))
    refused = [second.put("two", str(number), entry(number, 700)) for number in range(9)]
    assert not refused[-1]
    assert value(DiskStore(tmp_path, None).get("one", "0")) == 0


def test_entries_of_others_go_after_two_weeks_and_ones_own_stay_however_old(tmp_path):
    for number in range(3):
        DiskStore(tmp_path, None).put("other", str(number), entry())
    DiskStore(tmp_path, None).put("teacher", "a", entry(3))
    age(tmp_path, 24 * 15)
    kept = DiskStore(tmp_path, None)
    assert kept.put("teacher", "b", entry())
    assert value(kept.get("teacher", "a")) == 3
    assert len(list(tmp_path.rglob("*.pt"))) == 2


def test_files_that_are_no_entries_are_neither_counted_nor_removed(tmp_path):
    model = tmp_path / "run" / "model.pt"
    model.parent.mkdir()
    model.write_bytes(b"weights" * 1000)
    age(tmp_path, 24 * 365)
    kept = DiskStore(tmp_path, 5000)
    assert kept.bytes == 0
    assert kept.put("teacher", "a", entry())
    assert not kept.put("teacher", "b", entry())
    assert model.exists()


def test_an_entry_that_is_written_again_counts_once(store):
    kept = store(max_bytes=10**6)
    kept.put("teacher", "a", entry())
    once = kept.bytes
    kept.put("teacher", "a", entry())
    assert kept.bytes == once


def test_a_passing_fault_of_the_system_removes_nothing(tmp_path, monkeypatch):
    DiskStore(tmp_path, None).put("teacher", "a", entry(3.0))
    whole = torch.load

    def busy(*_args, **_options):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(torch, "load", busy)
    with pytest.warns(CacheWarning, match=r"cannot be read .*Too many open files"):
        assert DiskStore(tmp_path, None).get("teacher", "a") is None
    monkeypatch.setattr(torch, "load", whole)
    assert value(DiskStore(tmp_path, None).get("teacher", "a")) == 3


class Trap:
    def __reduce__(self):
        return os.system, ("touch trapped",)


def flipped(path):
    """Another number in a file that is whole otherwise."""
    content = bytearray(path.read_bytes())
    content[content.rindex(torch.full((4,), 7.0).numpy().tobytes())] ^= 1
    path.write_bytes(content)


def holding(content):
    return lambda path: torch.save(content, path)


DAMAGES = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a flipped bit": flipped,
    "empty": lambda path: path.write_bytes(b""),
    "a program": lambda path: path.write_bytes(pickle.dumps(Trap())),
    "a list": holding(["a", "list"]),
    "no entry": holding({"weights": torch.ones(3)}),
    "an entry of something else": holding({"entry": {"tap.x": 5}, "hash": ""}),
    "no hash": holding({"entry": {"tap.x": torch.zeros(1)}}),
    "numbers without end": holding({"entry": {"tap.x": torch.zeros(1).expand(10**12)}, "hash": ""}),
    "no numbers": holding({"entry": {"tap.x": torch.zeros(9, device="meta")}, "hash": ""}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_entries_are_removed_and_never_served(tmp_path, damage, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "cache"
    DiskStore(folder, None).put("teacher", "a", entry(7.0))
    (path,) = folder.glob("*/*.pt")
    DAMAGES[damage](path)
    with pytest.warns(CacheWarning, match="is damaged"):
        assert DiskStore(folder, None).get("teacher", "a") is None
    assert not path.exists()
    assert not (tmp_path / "trapped").exists()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="file/cache cannot be made"):
        DiskStore(tmp_path / "file" / "cache", None)


def test_a_full_disk_costs_the_entry_and_leaves_nothing(tmp_path, monkeypatch):
    def full(_content, path):
        path.write_bytes(b"torn")
        raise RuntimeError("PytorchStreamWriter failed: No space left on device")

    kept = DiskStore(tmp_path, None)
    monkeypatch.setattr(torch, "save", full)
    with pytest.warns(CacheWarning, match="No space left"):
        assert not kept.put("teacher", "a", entry())
    assert kept.get("teacher", "a") is None
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_files_of_killed_processes_are_cleared_away(tmp_path, monkeypatch):
    monkeypatch.setattr("pathlib.Path.unlink", lambda *_, **__: None)
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: None)
    DiskStore(tmp_path, None).put("teacher", "a", entry())
    monkeypatch.undo()
    (torn,) = (path for path in tmp_path.rglob("*") if path.is_file())
    age(tmp_path, 24 * 15)
    kept = DiskStore(tmp_path, None)
    assert kept.put("teacher", "b", entry())
    assert not torn.exists()


WRITER = """
import sys, torch
from pathlib import Path
from privdistill.cache.stores import DiskStore
store = DiskStore(Path(sys.argv[1]), None)
for number in range(10**6):
    value = torch.full((1, 200_000), float(number % 50))
    store.put("teacher", str(number % 50), {"tap.x": value})
    print(number, flush=True)
"""


@pytest.mark.faults
def test_two_writers_killed_at_any_moment_leave_no_torn_entry(tmp_path):
    for attempt in range(10):
        command = [sys.executable, "-c", WRITER, str(tmp_path)]
        writers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        for writer in writers:
            writer.stdout.readline()
        time.sleep(0.05 + 0.03 * attempt)
        for writer in writers:
            writer.kill()
            writer.communicate()
        kept = DiskStore(tmp_path, None)
        found = [kept.get("teacher", str(number)) for number in range(50)]
        assert any(found)
        for number, one in enumerate(found):
            assert one is None or (one["tap.x"] == number).all()


LIMITED = """
import resource, signal, sys, warnings, torch
from pathlib import Path
from privdistill.cache.stores import DiskStore
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
store = DiskStore(Path(sys.argv[1]), None)
kept = [store.put("t", str(n), {"x": torch.ones(1, n)})
        for n in (10, 10**6, 20, 10**6)]
print(kept, sorted(path.name for path in Path(sys.argv[1]).glob("*/*")))
"""


@pytest.mark.faults
def test_a_file_that_the_system_cuts_short_is_not_kept(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert run.stdout == "[True, False, True, False] ['10.entry.pt', '20.entry.pt']\n"
    assert run.stderr.count("CacheWarning: TeacherCache: ") == 1


class Halving(dict):
    """A store of the user's own, which halves what it keeps."""

    bytes = 0

    def get(self, teacher, name):
        entry = super().get((teacher, name))
        return entry and {key: value.float() for key, value in entry.items()}

    def put(self, teacher, name, entry):
        # What the teacher saw is compared, and stays as it is.
        rest = {key: value.half() for key, value in entry.items() if key != "input"}
        self[teacher, name] = {"input": entry["input"], **rest}
        self.bytes += sum(value.nbytes for value in self[teacher, name].values())
        return True


def test_a_store_of_the_user_keeps_what_the_teacher_said(networks):
    store, inputs = Halving(), PrivilegedInput(("flair", "t1", "t1ce", "t2"), student=("t1ce",))
    options = {"objective": SoftTargetDiceBCE(), "inputs": inputs}
    kd = DistillationWrapper(*networks, cache=TeacherCache(store=store), **options)
    image = torch.rand(2, 4, 8, 8)
    first, second = (kd(image, key=["a", "b"]).teacher for _ in range(2))
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3)
    assert (kd.cache.statistics.hits, kd.cache.statistics.bytes) == (2, store.bytes)
    assert store.bytes == 2 * (4 * 5 + 2 * 3 * 8 * 8)
