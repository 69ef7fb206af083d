import os
import pickle
import subprocess
import sys
import time

import pytest
import torch

from privdistill import CacheError, CacheWarning
from privdistill.cache.entries import Entry
from privdistill.cache.stores import DiskStore, MemoryStore


def entry(value=1.0, length=100):
    return Entry(torch.zeros(1, 1), {"tap.x": (torch.full((1, length), float(value)),)})


def value(found):
    return None if found is None else found.parts["tap.x"][0][0, 0].item()


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


def test_entries_of_another_teacher_are_never_served(store):
    kept = store()
    kept.put("teacher", "a", entry())
    assert kept.get("other", "a") is None


def test_a_full_store_keeps_what_it_has(store):
    kept = store(max_bytes=15_000)
    stored = [kept.put("teacher", str(i), entry(i, 1000)) for i in range(9)]
    assert stored[0]
    assert not stored[-1]
    assert value(kept.get("teacher", "0")) == 0
    assert kept.bytes <= 15_000


def test_entries_of_other_teachers_make_room(store, monkeypatch):
    monkeypatch.setattr("privdistill.cache.stores._RECENT", -1.0)
    kept = store(max_bytes=15_000)
    kept.put("old", "a", entry(1, 500))
    kept.put("old", "b", entry(2, 500))
    assert kept.put("new", "a", entry(3, 500))
    assert kept.put("new", "b", entry(4, 500))
    assert value(kept.get("new", "b")) == 4


def test_entries_that_another_run_may_use_stay(tmp_path):
    first, second = (DiskStore(tmp_path, 15_000) for _ in range(2))
    for number in range(3):
        first.put("one", str(number), entry(number, 700))
    refused = [second.put("two", str(number), entry(number, 700)) for number in range(9)]
    assert not refused[-1]
    assert value(DiskStore(tmp_path, None).get("one", "0")) == 0


def test_a_full_folder_is_not_listed_at_each_refusal(tmp_path, monkeypatch):
    kept = DiskStore(tmp_path, 1)
    assert not kept.put("teacher", "a", entry())
    monkeypatch.setattr(kept, "_files", None)
    assert not kept.put("teacher", "b", entry())


def test_an_entry_that_is_written_again_counts_once(store):
    kept = store(max_bytes=10**6)
    for _ in range(3):
        kept.put("teacher", "a", entry())
    once = store(max_bytes=10**6)
    once.put("teacher", "b" if isinstance(once, MemoryStore) else "a", entry())
    assert kept.bytes == once.bytes


def test_a_passing_fault_of_the_system_removes_nothing(tmp_path, monkeypatch):
    DiskStore(tmp_path, None).put("teacher", "a", entry(3.0))
    whole = torch.load

    def busy(*_args, **_options):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(torch, "load", busy)
    with pytest.warns(CacheWarning, match=r"cannot be read .*Too many open files.*runs again"):
        assert DiskStore(tmp_path, None).get("teacher", "a") is None
    monkeypatch.setattr(torch, "load", whole)
    assert value(DiskStore(tmp_path, None).get("teacher", "a")) == 3


def test_a_later_store_on_the_folder_finds_the_entries(tmp_path):
    DiskStore(tmp_path, None).put("teacher", "a", entry(3.0))
    assert value(DiskStore(tmp_path, None).get("teacher", "a")) == 3


def damage_cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_bit(path):
    content = bytearray(path.read_bytes())
    where = content.rindex(torch.full((4,), 7.0).numpy().tobytes())
    content[where] ^= 1
    path.write_bytes(content)


def damage_empty(path):
    path.write_bytes(b"")


def damage_other(path):
    torch.save({"weights": torch.ones(3)}, path)


class Trap:
    def __reduce__(self):
        return os.system, ("touch trapped",)


def damage_pickle(path):
    path.write_bytes(pickle.dumps(Trap()))


@pytest.mark.parametrize(
    "damage", [damage_cut, damage_bit, damage_empty, damage_other, damage_pickle]
)
def test_damaged_entries_are_removed_and_never_served(tmp_path, damage, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "cache"
    DiskStore(folder, None).put("teacher", "a", entry(7.0))
    (path,) = folder.glob("*/*.pt")
    damage(path)
    with pytest.warns(CacheWarning, match=r"damaged .*removed, and the teacher runs again"):
        assert DiskStore(folder, None).get("teacher", "a") is None
    assert not path.exists()
    assert not (tmp_path / "trapped").exists()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"folder .* cannot be made .*Choose one that can"):
        DiskStore(tmp_path / "file" / "cache", None)


def test_a_full_disk_costs_the_entry_and_says_so_once(tmp_path, monkeypatch):
    def full(*_):
        raise RuntimeError("PytorchStreamWriter failed: No space left on device")

    kept = DiskStore(tmp_path, None)
    monkeypatch.setattr(torch, "save", full)
    with pytest.warns(CacheWarning, match=r"cannot be written .*No space left.*Training goes on"):
        assert not kept.put("teacher", "a", entry())
    assert not kept.put("teacher", "b", entry())
    assert kept.get("teacher", "a") is None


def test_a_lost_folder_costs_the_entry_alone(tmp_path):
    kept = DiskStore(tmp_path / "cache", None)
    (tmp_path / "cache").rmdir()
    with pytest.warns(CacheWarning, match="cannot be written"):
        assert not kept.put("teacher", "a", entry())
    assert kept.get("teacher", "a") is None


def test_files_of_killed_processes_are_cleared_away(tmp_path):
    folder = tmp_path / "teacher"
    folder.mkdir()
    old, fresh = folder / ".1.partial", folder / ".2.partial"
    for path in (old, fresh):
        path.write_bytes(b"torn")
    os.utime(old, (time.time() - 7200,) * 2)
    kept = DiskStore(tmp_path, None)
    assert [path.name for path in folder.iterdir()] == [fresh.name]
    assert kept.bytes == 0


WRITER = """
import sys, torch
from pathlib import Path
from privdistill.cache.entries import Entry
from privdistill.cache.stores import DiskStore
store = DiskStore(Path(sys.argv[1]), None)
for number in range(10**6):
    value = torch.full((1, 200_000), float(number % 50))
    store.put("teacher", str(number % 50), Entry(torch.zeros(1, 1), {"tap.x": (value,)}))
    print(number, flush=True)
"""


@pytest.mark.faults
def test_two_writers_killed_at_any_moment_leave_no_torn_entry(tmp_path):
    for attempt in range(10):
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
            )
            for _ in range(2)
        ]
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
            assert one is None or (one.parts["tap.x"][0] == number).all()


LIMITED = """
import resource, signal, sys, warnings, torch
from pathlib import Path
from privdistill.cache.entries import Entry
from privdistill.cache.stores import DiskStore
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
store = DiskStore(Path(sys.argv[1]), None)
kept = [store.put("t", str(n), Entry(torch.zeros(1, 1), {"x": (torch.ones(1, n),)}))
        for n in (10, 10**6, 20, 10**6)]
print(kept, sorted(path.name for path in Path(sys.argv[1]).glob("*/*")))
"""


@pytest.mark.faults
def test_a_file_that_the_system_cuts_short_is_not_kept(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert run.stdout == "[True, False, True, False] ['10.pt', '20.pt']\n"
    assert run.stderr.count("CacheWarning: TeacherCache: entries cannot be written") == 1


@pytest.mark.parametrize(
    "content",
    [
        ["a", "list"],
        torch.zeros(2),
        {"digest": 3, "parts": {}, "checksum": 0},
        {"digest": torch.zeros(1, 1), "parts": 5, "checksum": 0},
        {"digest": torch.zeros(1, 1), "parts": {"tap.x": 5}, "checksum": 0},
        {"digest": torch.zeros(1, 1), "parts": {"tap.x": ("text",)}, "checksum": 0},
        {"digest": torch.zeros(1, 1), "parts": {3: (torch.zeros(1),)}, "checksum": 0},
        {"digest": torch.zeros(1, 1), "parts": {"x": (torch.zeros(1),) * 2}, "checksum": 0},
        {"digest": torch.zeros(1, 1), "parts": {"x": (torch.zeros(1).expand(10**12),)}},
        {"digest": torch.zeros(1, 1), "parts": {"x": (torch.zeros(9, device="meta"),)}},
    ],
)
def test_an_entry_with_wrong_types_is_removed_and_never_served(tmp_path, content):
    path = tmp_path / "teacher" / "a.pt"
    path.parent.mkdir()
    torch.save(content, path)
    with pytest.warns(CacheWarning, match="is damaged"):
        assert DiskStore(tmp_path, None).get("teacher", "a") is None
    assert not path.exists()
