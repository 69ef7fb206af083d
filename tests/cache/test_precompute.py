import pytest
import torch
from torch import nn

from privdistill import CacheError, DistillationWrapper, SoftTargetDiceBCE, TeacherCache, precompute

BATCHES = [(torch.rand(2, 1, 4, 4, 4), [f"case{i}", f"case{i + 1}"]) for i in (0, 2)]


def wrapper(cache):
    teacher, student = nn.Conv3d(1, 2, 3, padding=1), nn.Conv3d(1, 2, 1)
    return DistillationWrapper(teacher, student, objective=SoftTargetDiceBCE(), cache=cache)


def test_training_finds_all_of_it():
    kd = wrapper(TeacherCache())
    assert precompute(kd, BATCHES, progress=False).stored == 4
    for image, keys in BATCHES:
        kd(image, key=keys)
    assert kd.cache.statistics.hits == 4


def test_every_flip_has_its_own_entry():
    kd = wrapper(TeacherCache())
    precompute(kd, BATCHES, flips=True, progress=False)
    image, keys = BATCHES[0]
    expected = kd.teacher(image.flip(2, 4))
    out = kd(image.flip(2, 4), key=[f"{key}/flip5" for key in keys])
    assert torch.equal(out.teacher, expected)
    found = kd.cache.statistics
    assert (found.stored, found.hits) == (32, 2)


def test_a_second_call_runs_nothing(monkeypatch):
    kd = wrapper(TeacherCache())
    precompute(kd, BATCHES, progress=False)
    monkeypatch.setattr(TeacherCache, "_check_now_and_then", lambda *_: None)
    monkeypatch.setattr(kd.teacher, "forward", None)
    precompute(kd, BATCHES, progress=False)


def test_progress_is_shown_on_standard_error(capsys):
    precompute(wrapper(TeacherCache()), BATCHES)
    shown = capsys.readouterr().err
    assert "[##########          ] 1/2 batches, " in shown
    assert shown.endswith("2/2 batches, 0 s left  \n")
    precompute(wrapper(TeacherCache()), iter(BATCHES))
    assert "\rteacher outputs: 2 batches, 0 s  \n" in capsys.readouterr().err


def test_a_wrapper_without_a_cache_is_refused():
    with pytest.raises(CacheError, match=r"the wrapper has no cache.*cache=TeacherCache\(folder\)"):
        precompute(wrapper(None), BATCHES)
