import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from privdistill import CacheError, TeacherCache
from privdistill.cache.teacher_cache import mirror, mirror_each

VIEW = torch.arange(2 * 3 * 4.0).reshape(2, 1, 3, 4)
KEYS = ["a", "b"]


class Teacher:
    """Twice its view, and how often it was asked."""

    def __init__(self):
        self.runs = 0

    def __call__(self, view):
        self.runs += 1
        return {"logits.0.0": 2 * view}


def fetch(cache, teacher, view=VIEW, keys=KEYS, name="teacher"):
    return cache.fetch(name, keys, view, lambda: teacher(view))["logits.0.0"]


@pytest.fixture(autouse=True)
def _never_compared(monkeypatch):
    """Count the runs that outputs cost; the comparison has tests of its own."""
    monkeypatch.setattr(TeacherCache, "_check_now_and_then", lambda *_: None)


@pytest.fixture(params=["memory", "disk"])
def cache(request, tmp_path):
    return TeacherCache(None if request.param == "memory" else tmp_path)


def test_a_batch_that_is_known_does_not_run_the_teacher(cache):
    teacher = Teacher()
    first, second = fetch(cache, teacher), fetch(cache, teacher)
    assert torch.equal(first, 2 * VIEW)
    assert torch.equal(second, 2 * VIEW)
    assert teacher.runs == 1


def test_samples_are_found_in_another_batch_and_order(cache):
    teacher = Teacher()
    fetch(cache, teacher)
    assert torch.equal(fetch(cache, teacher, VIEW.flip(0), KEYS[::-1]), 2 * VIEW.flip(0))
    assert torch.equal(fetch(cache, teacher, VIEW[:1], ["a"]), 2 * VIEW[:1])
    assert teacher.runs == 1


def test_one_missing_sample_runs_the_whole_batch(cache):
    teacher = Teacher()
    fetch(cache, teacher, VIEW[:1], ["a"])
    fetch(cache, teacher)
    fetch(cache, teacher)
    assert teacher.runs == 2
    found = cache.statistics
    assert (found.hits, found.misses, found.stored, found.skipped) == (2, 3, 2, 0)


def test_entries_of_another_teacher_or_precision_are_not_served(cache):
    teacher = Teacher()
    fetch(cache, teacher)
    fetch(cache, teacher, name="other")
    fetch(cache, teacher, VIEW.double())
    with torch.autocast("cpu"):
        fetch(cache, teacher)
    assert teacher.runs == 4


def test_a_key_with_another_input_is_refused(cache):
    teacher = Teacher()
    fetch(cache, teacher)
    with pytest.raises(CacheError, match=r"key 'b' came back with another input .*Name every"):
        fetch(cache, teacher, torch.cat((VIEW[:1], VIEW[1:].flip(3))))
    assert teacher.runs == 1


def test_rounding_is_no_other_input(cache):
    teacher = Teacher()
    fetch(cache, teacher)
    fetch(cache, teacher, VIEW * (1 + 1e-6))
    assert teacher.runs == 1


@pytest.mark.parametrize("keys", ["ab", ["a"], ["a", 1], ["a", ""], None, []])
def test_keys_that_name_no_samples_are_refused(keys):
    with pytest.raises(CacheError, match=r"`key` is .* for a batch of 2; pass one text per sample"):
        TeacherCache().fetch("t", keys or [], VIEW, dict)


def test_keys_never_become_paths(tmp_path):
    cache = TeacherCache(tmp_path / "inside")
    fetch(cache, Teacher(), VIEW, ["../../outside", "/etc/passwd\0"])
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]
    assert all(path.stem.isalnum() for path in (tmp_path / "inside").glob("*/*"))


def test_narrow_storage_tells_its_error():
    cache = TeacherCache(storage="8bit")
    fetch(cache, Teacher())
    served = fetch(cache, Teacher())
    assert cache.statistics.max_error == pytest.approx((served - 2 * VIEW).abs().max().item())
    # Half of a step of 1/255 of the range of a sample, 0 to 22.
    assert 0 < cache.statistics.max_error <= 22 / 255 / 2 * 1.001


def test_what_there_is_no_room_for_is_counted():
    cache = TeacherCache(max_bytes=1)
    teacher = Teacher()
    fetch(cache, teacher)
    fetch(cache, teacher)
    assert teacher.runs == 2
    assert str(cache.statistics) == "0 hits, 4 misses, 4 not stored, 0 bytes"


def test_one_entry_serves_every_flip():
    cache, teacher = TeacherCache(share_flips=True), Teacher()
    fetch(cache, teacher, VIEW, ["a/flip0", "b/flip0"])
    mixed = torch.cat((VIEW[:1].flip(2), VIEW[1:].flip(2, 3)))
    served = fetch(cache, teacher, mixed, ["a/flip1", "b/flip3"])
    assert torch.equal(served, 2 * mixed)
    assert teacher.runs == 1


def test_a_flip_that_was_seen_first_serves_the_others():
    cache, teacher = TeacherCache(share_flips=True), Teacher()
    fetch(cache, teacher, VIEW.flip(3), ["a/flip2", "b/flip2"])
    assert torch.equal(fetch(cache, teacher, VIEW, ["a", "b/flip0"]), 2 * VIEW)
    assert teacher.runs == 1


@pytest.mark.parametrize("key", ["a/flip4", "a/flip-1", "a/flip", "a/flipx"])
def test_a_key_with_no_flip_of_the_image_is_refused(key):
    with pytest.raises(CacheError, match=r"ends in no flip of 2 spatial axes.*'/flip3'"):
        fetch(TeacherCache(share_flips=True), Teacher(), VIEW, [key, "b"])


def test_tokens_cannot_be_flipped():
    cache = TeacherCache(share_flips=True)
    with pytest.raises(CacheError, match=r"'tap.x': \(2, 5\)} have not 2 spatial axes"):
        cache.fetch("t", KEYS, VIEW, lambda: {"tap.x": torch.zeros(2, 5)})


@given(st.integers(0, 7))
def test_flipping_twice_is_nothing(code):
    values = torch.arange(24.0).reshape(1, 1, 2, 3, 4)
    assert torch.equal(mirror(mirror(values, code, 3), code, 3), values)
    assert torch.equal(mirror_each(values, [code], 3), mirror(values, code, 3))


def test_copies_share_the_cache_and_pickles_leave_memory_behind():
    cache = TeacherCache(max_bytes=10**6)
    fetch(cache, Teacher())
    assert copy.deepcopy(cache) is cache
    loaded = pickle.loads(pickle.dumps(cache))
    assert repr(loaded) == repr(cache) == "TeacherCache(max_bytes=1000000)"
    assert loaded.statistics.bytes == 0


def test_a_pickled_cache_opens_its_folder_again(tmp_path):
    cache, teacher = TeacherCache(tmp_path, storage="half"), Teacher()
    fetch(cache, teacher)
    loaded = pickle.loads(pickle.dumps(cache))
    assert repr(loaded) == f"TeacherCache({str(tmp_path)!r}, storage='half')"
    fetch(loaded, teacher)
    assert teacher.runs == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"storage": "4bit"}, r"`storage` must be 'full', 'half' or '8bit'; got '4bit'"),
        ({"max_bytes": 0}, r"`max_bytes` must be positive; got 0"),
    ],
)
def test_options_without_a_meaning_are_refused(options, message):
    with pytest.raises(CacheError, match=message):
        TeacherCache(**options)


def test_one_key_for_two_images_of_a_batch_is_refused():
    with pytest.raises(CacheError, match=r"key 'a' names two different images of one batch"):
        fetch(TeacherCache(), Teacher(), VIEW, ["a", "a"])
