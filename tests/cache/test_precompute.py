import pytest
import torch
from torch import nn

from privdistill import (
    CacheError,
    DistillationWrapper,
    PrivilegedInput,
    SoftTargetDiceBCE,
    TeacherCache,
    precompute,
)

BATCHES = [(torch.rand(2, 1, 4, 4, 4), [f"case{i}", f"case{i + 1}"]) for i in (0, 2)]


def wrapper(cache):
    teacher, student = nn.Conv3d(1, 2, 3, padding=1), nn.Conv3d(1, 2, 1)
    return DistillationWrapper(teacher, student, objective=SoftTargetDiceBCE(), cache=cache)


def test_training_finds_all_of_it():
    kd = wrapper(TeacherCache())
    assert precompute(kd, BATCHES).stored == 4
    for image, keys in BATCHES:
        kd(image, key=keys)
    assert kd.cache.statistics.hits == 4


def test_every_flip_has_its_own_entry():
    kd = wrapper(TeacherCache())
    precompute(kd, BATCHES, flips=True)
    image, keys = BATCHES[0]
    expected = kd.teacher(image.flip(2, 4))
    out = kd(image.flip(2, 4), key=[f"{key}/flip5" for key in keys])
    assert torch.equal(out.teacher, expected)
    found = kd.cache.statistics
    assert (found.stored, found.hits) == (32, 2)


def test_a_second_call_finds_everything():
    kd = wrapper(TeacherCache())
    for _ in range(2):
        precompute(kd, BATCHES)
    assert (kd.cache.statistics.hits, kd.cache.statistics.misses) == (4, 4)


def test_a_mapping_by_modality_is_flipped_as_a_whole():
    kd = DistillationWrapper(
        nn.Conv2d(2, 2, 3, padding=1),
        nn.Conv2d(1, 2, 1),
        objective=SoftTargetDiceBCE(),
        inputs=PrivilegedInput(("t1", "t2"), student=("t1",)),
        cache=TeacherCache(),
    )
    image = {name: torch.rand(1, 1, 4, 4) for name in ("t1", "t2")}
    assert precompute(kd, [(image, ["a"])], flips=True).stored == 4
    kd({name: part.flip(3) for name, part in image.items()}, key=["a/flip2"])
    assert kd.cache.statistics.hits == 1


def test_a_wrapper_without_a_cache_is_refused():
    with pytest.raises(CacheError, match="cache=TeacherCache"):
        precompute(wrapper(None), BATCHES)


def test_one_text_for_a_batch_is_refused_with_flips_too():
    with pytest.raises(CacheError, match="batch of 2"):
        precompute(wrapper(TeacherCache()), [(BATCHES[0][0], "ab")], flips=True)
