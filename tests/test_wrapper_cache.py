"""A wrapper with a cache: the same training, without the teacher's forward."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from privdistill import (
    CacheError,
    DistillationWrapper,
    Ensemble,
    FeatureL2,
    GroundTruth,
    JointTeacher,
    LatentKL,
    LifecycleError,
    MovingAverage,
    PrivilegedInput,
    SoftTargetDiceBCE,
    Tap,
    TeacherCache,
)

NAMES = ("flair", "t1", "t1ce", "t2")


@pytest.fixture
def batches():
    return [
        (
            torch.rand(2, 4, 8, 8),
            torch.randint(0, 3, (2, 8, 8)),
            [f"case{2 * i}", f"case{2 * i + 1}"],
        )
        for i in range(3)
    ]


def train(kd, batches, epochs=3):
    """Weights of the student after some epochs, in which batches change their order."""
    optimizer = torch.optim.Adam(kd.parameters(), lr=1e-2)
    for epoch in range(epochs):
        for image, target, keys in batches[epoch:] + batches[:epoch]:
            kd(image, target, key=keys).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return torch.cat([p.detach().flatten() for p in kd.parameters()])


def twins(networks, **options):
    """Two equal wrappers, one with a cache."""
    cache = options.pop("cache", None) or TeacherCache()
    usual = {
        "objective": 0.75 * SoftTargetDiceBCE() + 0.25 * GroundTruth() + 10.0 * LatentKL(),
        "inputs": PrivilegedInput(NAMES, student=("t1ce",)),
        "example": torch.zeros(1, 4, 8, 8),
    }
    wrappers = []
    for given in ({}, {"cache": cache}):
        teacher, student = copy.deepcopy(networks)
        teacher = options.get("declare", lambda t: t)(teacher)
        torch.manual_seed(0)
        rest = {k: v for k, v in (usual | options).items() if k != "declare"}
        wrappers.append(DistillationWrapper(teacher, student, **rest, **given))
    return wrappers


def forwards(kd):
    """Count the teacher's forward passes from here on."""
    calls, fetch = [], kd.cache.fetch
    kd.cache.fetch = lambda teacher, key, view, run: fetch(
        teacher, key, view, lambda: calls.append(1) or run()
    )
    return calls


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_training_with_the_cache_gives_bit_identical_weights(networks, batches, place, tmp_path):
    cache = TeacherCache(tmp_path if place == "disk" else None)
    plain, cached = twins(networks, cache=cache)
    calls = forwards(cached)
    assert torch.equal(train(plain, batches), train(cached, batches))
    # Three batches, and the first that was served, to compare.
    assert len(calls) == 3 + 1
    assert cached.cache.statistics.hits == 2 * 6


VARIANTS = {
    "latent terms alone": {"objective": GroundTruth() + LatentKL()},
    "an ensemble and several taps": {
        "declare": lambda teacher: Ensemble([teacher, copy.deepcopy(teacher)], [2, 1]),
        "objective": SoftTargetDiceBCE() + LatentKL() + FeatureL2("first"),
        "taps": {"first": Tap("encoder", "encoder"), "bottleneck": Tap("bottleneck", "bottleneck")},
    },
    "autocast": {},
    "channels last": {},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_trainings_are_bit_identical_too(networks, batches, variant):
    if variant == "channels last":
        networks = [net.to(memory_format=torch.channels_last) for net in networks]
        batches = [(image.to(memory_format=torch.channels_last), *b) for image, *b in batches]
    plain, cached = twins(networks, **VARIANTS[variant])
    with torch.autocast("cpu", dtype=torch.float16, enabled=variant == "autocast"):
        assert torch.equal(train(plain, batches, epochs=2), train(cached, batches, epochs=2))
    assert cached.cache.statistics.hits == 6


def test_without_keys_or_without_a_cache_nothing_is_cached(networks, batches):
    plain, cached = twins(networks)
    image, target, keys = batches[0]
    assert plain(image, target, key=keys).loss == cached(image, target).loss
    assert cached.cache.statistics.stored == 0


def test_a_teacher_whose_weights_change_is_asked_again(networks, batches):
    _, cached = twins(networks)
    image, target, keys = batches[0]
    before = cached(image, target, key=keys).teacher
    with torch.no_grad():
        cached.teacher.head.weight.mul_(2)
    after = cached(image, target, key=keys).teacher
    assert not torch.equal(before, after)
    assert torch.equal(after, cached(image, target).teacher)


OTHERS = {
    "teacher": {"declare": nn.Sequential},
    "view": {"inputs": PrivilegedInput(NAMES, teacher=NAMES[::-1], student=("t1ce",))},
    "tap": {"taps": {"bottleneck": Tap("bottleneck.0", "bottleneck.0")}},
    "logits alone": {"objective": SoftTargetDiceBCE() + GroundTruth()},
    "logits": {"select_logits": lambda output: 2 * output},
}


@pytest.mark.parametrize("other", OTHERS)
def test_two_runs_in_one_folder_never_share_what_differs(networks, batches, other, tmp_path):
    image, target, keys = batches[0]
    for options in ({}, OTHERS[other]):
        plain, cached = twins(networks, cache=TeacherCache(tmp_path), **options)
        found = cached(image, target, key=keys)
        assert torch.equal(found.loss, plain(image, target).loss)
        assert cached.cache.statistics.misses == 2


def test_a_later_run_on_the_folder_runs_the_teacher_once_to_compare(networks, batches, tmp_path):
    train(twins(networks, cache=TeacherCache(tmp_path))[1], batches)
    plain, later = twins(networks, cache=TeacherCache(tmp_path))
    calls = forwards(later)
    assert torch.equal(train(plain, batches), train(later, batches))
    assert len(calls) == 1


def test_an_augmentation_that_the_key_does_not_name_is_refused(networks, batches):
    _, cached = twins(networks)
    image, target, keys = batches[0]
    cached(image, target, key=keys)
    with pytest.raises(CacheError, match="came back with another input"):
        cached(image.flip(2), target.flip(1), key=keys)


def test_modalities_that_are_absent_belong_in_the_key(networks, batches):
    _, cached = twins(networks)
    image, target, keys = batches[0]
    cached(image, target, key=keys)
    present = torch.tensor([[True] * 4, [True, False, True, True]])
    with pytest.raises(CacheError, match="key 'case1' came back with another input"):
        cached(image, target, present=present, key=keys)


def test_validation_is_served_too(networks, batches):
    _, cached = twins(networks)
    image, target, keys = batches[0]
    cached.eval()
    with torch.inference_mode():
        first = cached(image, target, key=keys)
        second = cached(image, target, key=keys)
    cached.train()(image, target, key=keys).loss.backward()
    assert torch.equal(first.loss, second.loss)
    assert cached.cache.statistics.misses == 2


def test_what_was_served_can_be_changed_by_the_user(networks, batches, tmp_path):
    _, cached = twins(networks, cache=TeacherCache(tmp_path))
    image, target, keys = batches[0]
    first = cached(image, target, key=keys).teacher.clone()
    for _ in range(2):
        cached(image, target, key=keys).teacher.zero_()
    assert torch.equal(cached(image, target, key=keys).teacher, first)


def test_printing_shows_what_the_cache_did(networks, batches):
    _, cached = twins(networks)
    image, target, keys = batches[0]
    for _ in range(2):
        cached(image, target, key=keys)
    # Of each sample: 5 numbers of its input, 3 x 8 x 8 logits, 8 x 4 x 4 features.
    size = 2 * 4 * (5 + 3 * 8 * 8 + 8 * 4 * 4)
    assert f"  cache: {cached.cache!r}, 2 hits, 2 misses, {size} bytes" in repr(cached)


@pytest.mark.parametrize("teacher", [MovingAverage(), JointTeacher(nn.Conv2d(1, 2, 1))])
def test_a_teacher_that_changes_is_refused(teacher):
    with pytest.raises(LifecycleError, match=r"changes in every step, so its outputs cannot be"):
        DistillationWrapper(
            teacher, nn.Conv2d(1, 2, 1), objective=SoftTargetDiceBCE(), cache=TeacherCache()
        )


def test_a_folder_alone_is_no_cache():
    with pytest.raises(LifecycleError, match=r"`cache` is 'runs'; expected a TeacherCache"):
        DistillationWrapper(None, nn.Conv2d(1, 2, 1), objective=GroundTruth(), cache="runs")


def test_keys_without_anything_to_keep_are_accepted(networks, batches):
    _, cached = twins(networks, objective=GroundTruth(), example=None)
    image, target, keys = batches[0]
    assert cached(image, target, key=keys).teacher is None


def wrap(teacher, cache, **options):
    options = {"objective": SoftTargetDiceBCE()} | options
    return DistillationWrapper(teacher, nn.Conv2d(1, 2, 1), cache=cache, **options)


def test_a_teacher_that_depends_on_the_batch_is_found():
    teacher = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, track_running_stats=False))
    kd = wrap(teacher, TeacherCache())
    images = torch.rand(3, 1, 4, 4) * torch.tensor([1.0, 5.0, 25.0]).reshape(3, 1, 1, 1)
    for pair in ([0, 1], [1, 2]):
        kd(images[pair], key=[str(i) for i in pair])
    with pytest.raises(CacheError, match="is no longer what was kept"):
        kd(images[[0, 2]], key=["0", "2"])


def normed():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))


# From a wrapper and a folder: another wrapper with the same teacher, in other hands or as it was
# before it was frozen.
ALIKE = {
    "the same object": lambda kd, folder: wrap(kd.teacher, TeacherCache(folder)),
    "a copied teacher": lambda kd, folder: wrap(copy.deepcopy(kd.teacher), TeacherCache(folder)),
    "a copied wrapper": lambda kd, _folder: copy.deepcopy(kd),
    "a pickled wrapper": lambda kd, _folder: pickle.loads(pickle.dumps(kd)),
    "eval mode": lambda _kd, folder: wrap(normed().eval(), TeacherCache(folder)),
    "no gradients": lambda _kd, folder: wrap(normed().requires_grad_(False), TeacherCache(folder)),
}


@pytest.mark.parametrize("other", ALIKE)
def test_one_teacher_has_one_set_of_entries(other, tmp_path):
    image = torch.rand(2, 1, 4, 4)
    first = wrap(normed(), TeacherCache(tmp_path))
    first(image, key=["a", "b"])
    again = ALIKE[other](first, tmp_path)
    misses = again.cache.statistics.misses
    assert torch.equal(again(image, key=["a", "b"]).teacher, first(image).teacher)
    assert again.cache.statistics.misses == misses
    assert len(list(tmp_path.iterdir())) == 1
    # Another wrapper that came or went changes nothing for the first.
    first(image, key=["a", "b"])
    again.close()
    first(image, key=["a", "b"])
    assert first.cache.statistics.misses == 2


def hooked(teacher):
    teacher[0].register_forward_hook(lambda _layer, _inputs, output: 2 * output)


def optioned(teacher):
    teacher[1].eps = 10.0


@pytest.mark.parametrize("change", [hooked, optioned])
def test_a_change_that_no_weight_shows_is_found_and_has_a_version(change, tmp_path):
    other, image = normed(), torch.rand(2, 1, 4, 4)
    change(other)
    wrap(normed(), TeacherCache(tmp_path))(image, key=["a", "b"])
    with pytest.raises(CacheError, match="`version`"):
        wrap(other, TeacherCache(tmp_path))(image, key=["a", "b"])
    kd = wrap(other, TeacherCache(tmp_path, version="v2"))
    for _ in range(2):
        assert torch.equal(kd(image, key=["a", "b"]).teacher, kd(image).teacher)
    assert (kd.cache.statistics.hits, kd.cache.statistics.misses) == (2, 2)


# The compiler looks at tensors that are no leaves where the graph breaks.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
# Of PyTorch 2.6, about its own settings.
@pytest.mark.filterwarnings("ignore:Skipping serialization of skipfiles")
@pytest.mark.parametrize("compiled", [torch.compile, lambda net: net.compile() or net])
def test_promise_9_a_compiled_teacher_finds_what_the_eager_one_left(compiled, tmp_path):
    image = torch.rand(2, 1, 4, 4)
    expected = wrap(normed(), TeacherCache(tmp_path))(image, key=["a", "b"]).teacher
    kd = wrap(compiled(normed()), TeacherCache(tmp_path))
    torch.testing.assert_close(kd(image, key=["a", "b"]).teacher, expected)
    assert (kd.cache.statistics.hits, kd.cache.statistics.misses) == (2, 0)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_new_keys_compile_nothing_new_and_leave_one_break(networks, batches):
    torch._dynamo.reset()
    plain, cached = twins(networks, validate="never")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(cached, backend=counter)
    image, target, _ = batches[0]
    # More kinds of keys than graphs of one function; the second name is that of PyTorch 2.6.
    limits = ("recompile_limit", "cache_size_limit")
    limit = next(name for name in limits if hasattr(torch._dynamo.config, name))
    with torch._dynamo.config.patch({limit: 2}):
        for number in range(4):
            for _ in range(2):
                found = compiled(image, target, key=[f"{number}/0", f"{number}/1"]).loss
    assert counter.frame_count == 2
    assert torch.allclose(found, plain(image, target).loss)
    assert cached.cache.statistics.hits == cached.cache.statistics.misses


def test_a_sharded_teacher_is_refused(monkeypatch):
    teacher = nn.Conv2d(1, 2, 1)
    monkeypatch.setattr("privdistill.parallel.any_sharded", lambda parts: teacher in [*parts])
    with pytest.raises(
        LifecycleError, match=r"The teacher is sharded by FSDP.*wait for each other"
    ):
        wrap(teacher, TeacherCache())


def test_a_cache_that_is_set_after_the_wrapper_was_built_is_refused(build):
    kd = build()
    with pytest.raises(LifecycleError, match="fixed when the wrapper is built"):
        kd.cache = TeacherCache()
    assert kd.cache is None
