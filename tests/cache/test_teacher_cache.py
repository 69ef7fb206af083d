import copy
import pickle

import pytest
import torch

from privdistill import CacheError, TeacherCache
from privdistill.cache.stores import DiskStore

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


@pytest.fixture(params=["memory", "disk"])
def cache(request, tmp_path):
    return TeacherCache(None if request.param == "memory" else tmp_path)


def counts(cache):
    return cache.statistics.hits, cache.statistics.misses


def test_a_batch_that_is_known_is_served(cache):
    teacher = Teacher()
    first, second = fetch(cache, teacher), fetch(cache, teacher)
    assert torch.equal(first, 2 * VIEW)
    assert torch.equal(second, 2 * VIEW)
    assert counts(cache) == (2, 2)


def test_the_teacher_runs_for_what_is_new_and_now_and_then_to_compare(cache):
    teacher = Teacher()
    for _ in range(502):
        fetch(cache, teacher)
    # Once for the samples, and for the first batch that was served and the 501st.
    assert teacher.runs == 3


def test_samples_are_found_in_another_batch_and_order(cache):
    teacher = Teacher()
    fetch(cache, teacher)
    assert torch.equal(fetch(cache, teacher, VIEW.flip(0), KEYS[::-1]), 2 * VIEW.flip(0))
    assert torch.equal(fetch(cache, teacher, VIEW[:1], ["a"]), 2 * VIEW[:1])
    assert counts(cache) == (3, 2)


def test_one_missing_sample_runs_the_whole_batch(cache):
    teacher = Teacher()
    fetch(cache, teacher, VIEW[:1], ["a"])
    fetch(cache, teacher)
    assert teacher.runs == 2
    fetch(cache, teacher)
    found = cache.statistics
    assert (found.hits, found.misses, found.stored, found.skipped) == (2, 3, 2, 0)


def test_entries_of_another_teacher_or_precision_are_not_served(cache):
    teacher = Teacher()
    fetch(cache, teacher)
    fetch(cache, teacher, name="other")
    fetch(cache, teacher, VIEW.double())
    with torch.autocast("cpu"):
        fetch(cache, teacher)
    # Not of runs: what is served for the first time is compared.
    assert counts(cache) == (0, 8)


def test_a_key_with_another_input_is_refused(cache):
    teacher = Teacher()
    fetch(cache, teacher)
    with pytest.raises(CacheError, match="key 'b'"):
        fetch(cache, teacher, torch.cat((VIEW[:1], VIEW[1:].flip(3))))
    assert teacher.runs == 1


def test_rounding_is_no_other_input(cache):
    teacher = Teacher()
    fetch(cache, teacher)
    fetch(cache, teacher, VIEW * (1 + 1e-6))
    assert counts(cache) == (2, 2)


@pytest.mark.parametrize("keys", ["ab", ["a"], ["a", 1], ["a", ""], None, []])
def test_keys_that_name_no_samples_are_refused(keys):
    with pytest.raises(CacheError, match="batch of 2"):
        TeacherCache().fetch("t", keys or [], VIEW, dict)


def test_keys_never_become_paths(tmp_path):
    cache = TeacherCache(tmp_path / "inside")
    fetch(cache, Teacher(), VIEW, ["../../outside", "/etc/passwd\0"])
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]
    assert all(path.name.split(".")[0].isalnum() for path in (tmp_path / "inside").glob("*/*"))


def kept(value, **options):
    """What comes back of an output."""
    cache = TeacherCache(**options)
    for _ in range(2):
        served = cache.fetch("t", ["a"], VIEW[:1], lambda: {"tap.x": value})["tap.x"]
    assert cache.statistics.hits == 1
    return served


def test_full_storage_keeps_every_bit():
    value = torch.tensor([[[0.1, float("inf"), -0.0, -float("inf"), 1e-45]]])
    assert kept(value).view(torch.int32).tolist() == value.view(torch.int32).tolist()


def test_half_storage_rounds_and_stays_finite_beyond_the_range_of_float16():
    value = torch.tensor([[[0.1, 65000.0, 66000.0]]])
    expected = torch.tensor([[[0.1, 65000.0, 65504.0]]]).half().float()
    assert torch.equal(kept(value, storage="half"), expected)


@pytest.mark.parametrize("least", [-float("inf"), -1e9])
def test_half_storage_serves_a_teacher_that_rules_out_a_class(least):
    def masking(view):
        return {"logits.0.0": view.masked_fill(view == 0, least)}

    cache = TeacherCache(storage="half")
    fetch(cache, masking)
    # The first batch that is served is compared with the teacher.
    assert fetch(cache, masking)[0, 0, 0, :2].tolist() == [-65504.0, 1.0]


@pytest.mark.parametrize("storage", ["full", "half"])
def test_outputs_of_16_bits_stay_as_they_are(storage):
    value = torch.tensor([[[1e5, 1.0]]], dtype=torch.bfloat16)
    found = kept(value, storage=storage)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, value)


@pytest.mark.parametrize("storage", ["full", "half"])
def test_what_is_kept_is_a_copy(storage):
    cache, value = TeacherCache(storage=storage), torch.ones(1, 1, 3)
    cache.fetch("t", ["a"], VIEW[:1], lambda: {"tap.x": value})
    value.zero_()
    ones = {"tap.x": torch.ones(1, 1, 3)}
    for _ in range(2):
        served = cache.fetch("t", ["a"], VIEW[:1], lambda: ones)["tap.x"]
        assert served.tolist() == [[[1, 1, 1]]]
        served.zero_()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_a_served_batch_has_the_layout_of_its_samples(layout, cache):
    batch = torch.rand(2, 3, 4, 5, 6).to(memory_format=layout)
    for _ in range(2):
        served = cache.fetch("t", KEYS, VIEW, lambda: {"tap.x": batch})["tap.x"]
    assert torch.equal(served, batch)
    assert served.stride() == batch.stride()


def test_outputs_that_changed_for_no_visible_reason_are_refused_until_another_version(tmp_path):
    for version, factor in (("v1", 1), ("v2", 3)):
        cache = TeacherCache(tmp_path, version=version)
        for _ in range(2):
            served = cache.fetch("t", KEYS, VIEW, lambda by=factor: {"logits.0.0": by * VIEW})
            assert torch.equal(served["logits.0.0"], factor * VIEW)
    later = TeacherCache(tmp_path, version="v2")
    with pytest.raises(CacheError, match="`version`"):
        later.fetch("t", KEYS, VIEW, lambda: {"logits.0.0": VIEW})


def test_what_there_is_no_room_for_is_counted():
    cache = TeacherCache(max_bytes=1)
    teacher = Teacher()
    fetch(cache, teacher)
    fetch(cache, teacher)
    assert teacher.runs == 2
    assert str(cache.statistics) == "0 hits, 4 misses, 4 not stored, 0 bytes"


def test_copies_share_the_cache_and_pickles_leave_memory_behind():
    cache = TeacherCache(max_bytes=10**6)
    fetch(cache, Teacher())
    assert copy.deepcopy(cache) is cache
    loaded = pickle.loads(pickle.dumps(cache))
    assert repr(loaded) == repr(cache)
    assert loaded.statistics.bytes == 0


def test_a_pickled_cache_opens_its_folder_again(tmp_path):
    cache, teacher = TeacherCache(tmp_path, storage="half", version="v2"), Teacher()
    fetch(cache, teacher)
    loaded = pickle.loads(pickle.dumps(cache))
    assert repr(loaded) == repr(cache)
    fetch(loaded, teacher)
    assert counts(loaded) == (2, 2)


@pytest.mark.parametrize(("answer", "counted"), [(None, (2, 0)), (False, (0, 2))])
def test_a_store_may_answer_nothing_when_it_keeps_an_entry(answer, counted):
    class Own(dict):
        bytes = 0

        def get(self, teacher, name):
            return super().get((teacher, name))

        def put(self, teacher, name, entry):
            self[teacher, name] = entry
            return answer

    cache = TeacherCache(store=Own())
    assert torch.equal(fetch(cache, Teacher()), fetch(cache, Teacher()))
    assert (cache.statistics.stored, cache.statistics.skipped) == counted


def test_a_store_that_lacks_a_method_is_refused():
    with pytest.raises(CacheError, match="a dict"):
        TeacherCache(store={})


def test_a_printed_cache_shows_its_options(tmp_path):
    cache = TeacherCache(tmp_path, version="v2", storage="half", max_bytes=99)
    assert all(part in repr(cache) for part in (str(tmp_path), "v2", "half", "99"))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"storage": "4bit"}, "4bit"),
        ({"store": DiskStore, "folder": "f"}, "`folder`"),
        ({"store": DiskStore, "max_bytes": 1}, "`max_bytes`"),
    ],
)
def test_options_without_a_meaning_are_refused(options, name):
    with pytest.raises(CacheError, match=name):
        TeacherCache(**options)


def test_one_key_for_two_images_is_refused_when_it_comes_back():
    cache = TeacherCache()
    fetch(cache, Teacher(), VIEW, ["a", "a"])
    with pytest.raises(CacheError, match="key 'a'"):
        fetch(cache, Teacher(), VIEW, ["a", "a"])
