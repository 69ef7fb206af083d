"""Cache and loader: read once, never stale, the same order whatever the workers."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from written import write_volume

import kdnet.data.loading
from kdnet.data.description import load_description
from kdnet.data.loading import EpochSampler, build_loader, flip, prepare, start_epoch
from kdnet.data.preprocessing import Preprocessing
from kdnet.data.subjects import find_subjects
from kdnet.data.volumes import read_volume
from kdnet.errors import UserError
from phantoms import generate_phantoms


class CountingPreprocessing(Preprocessing):
    """Counts how often a subject is really read."""

    reads = 0

    def __call__(self, data):
        self.reads += 1
        return super().__call__(data)


@pytest.fixture
def subjects(brats_folder):
    return find_subjects(brats_folder)[1]


@pytest.fixture
def preprocessing():
    description = load_description(Path("brats2021"))
    return CountingPreprocessing(description, ("t1", "t1ce"), None, (6, 6, 6))


def loader(dataset, **settings):
    chosen = {"shuffle": True, "seed": 0, "flips": True, "workers": 0} | settings
    return build_loader(dataset, 2, **chosen)


def keys(chosen, epoch):
    start_epoch(chosen, epoch)
    return [key for batch in chosen for key in batch["key"]]


def test_each_subject_is_read_once(subjects, preprocessing, tmp_path):
    for _ in range(2):
        dataset = prepare(subjects, preprocessing, tmp_path / "cache", 2, progress=False)
        for index in range(3):
            direct = Preprocessing.__call__(preprocessing, subjects[index])
            assert torch.equal(dataset[index]["image"], direct["image"])
            assert torch.equal(dataset[index]["label"], direct["label"])
    assert preprocessing.reads == 3
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[0]["image"], dataset[0]["image"])
    other = CountingPreprocessing(preprocessing.description, ("t1", "t1ce"), None, (4, 4, 4))
    dataset = prepare(subjects, other, tmp_path / "cache", 1, progress=False)
    assert dataset[0]["image"].shape == (2, 4, 4, 4)


def test_a_changed_file_is_read_again(subjects, preprocessing, tmp_path):
    prepare(subjects, preprocessing, tmp_path / "cache", 1, progress=False)
    path = subjects[1].images["t1"].path
    before = path.stat()
    volume = np.random.default_rng(9).integers(1, 9, size=(12, 12, 12)).astype(np.int16)
    write_volume(path, volume)
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    dataset = prepare(subjects, preprocessing, tmp_path / "cache", 1, progress=False)
    assert preprocessing.reads == 4
    direct = Preprocessing.__call__(preprocessing, subjects[1])
    assert torch.equal(dataset[1]["image"], direct["image"])


def test_a_cache_file_cut_short_is_made_again(subjects, preprocessing, tmp_path):
    prepare(subjects, preprocessing, tmp_path / "cache", 1, progress=False)
    file = next((tmp_path / "cache").rglob("*.safetensors"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    dataset = prepare(subjects, preprocessing, tmp_path / "cache", 1, progress=False)
    assert all(dataset[index]["image"].shape == (2, 6, 6, 6) for index in range(3))
    assert preprocessing.reads == 4


def test_a_failure_leaves_no_partial_file(subjects, preprocessing, tmp_path):
    subjects[2].images["t1"].path.write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"BraTS2021_00002_t1\.nii: cannot be opened"):
        prepare(subjects, preprocessing, tmp_path / "cache", 2, progress=False)
    left = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert all(path.suffix == ".safetensors" for path in left)


def test_a_cache_that_cannot_be_written_is_one_message(
    subjects, preprocessing, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("a file")
    with pytest.raises(UserError, match="cannot be written"):
        prepare(subjects, preprocessing, tmp_path / "file", 1, progress=False)

    def save(tensors, path, metadata):
        path.write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", save)
    with pytest.raises(UserError, match="cannot be written"):
        prepare(subjects, preprocessing, tmp_path / "cache", 1, progress=False)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_batch_has_what_training_needs(subjects, preprocessing, tmp_path):
    dataset = prepare(subjects, preprocessing, tmp_path / "cache", 1, progress=False)
    batch = next(iter(loader(dataset, shuffle=False, flips=False)))
    assert batch["image"].shape == (2, 2, 6, 6, 6)
    assert batch["image"].dtype == torch.float32
    assert batch["label"].shape == (2, 1, 6, 6, 6)
    assert batch["label"].dtype == torch.int64
    assert batch["name"] == ["BraTS2021_00000", "BraTS2021_00001"]
    assert batch["key"] == ["BraTS2021_00000/flip0", "BraTS2021_00001/flip0"]


def test_the_key_names_the_flip_of_image_and_label(subjects, preprocessing, tmp_path):
    dataset = prepare(subjects, preprocessing, tmp_path / "cache", 1, progress=False)
    samples = {sample["name"]: sample for sample in (dataset[i] for i in range(3))}
    for batch in loader(dataset):
        for image, label, key in zip(batch["image"], batch["label"], batch["key"], strict=True):
            name, code = key.split("/flip")
            assert torch.equal(image, flip(samples[name]["image"], int(code)))
            assert torch.equal(label, flip(samples[name]["label"], int(code)).long())


def test_an_epoch_depends_on_seed_and_epoch_alone(subjects, preprocessing, tmp_path):
    dataset = prepare(subjects * 4, preprocessing, tmp_path / "cache", 1, progress=False)
    straight = [keys(loader(dataset), epoch) for epoch in range(3)]
    first = loader(dataset)
    assert [keys(first, epoch) for epoch in range(3)] == straight
    assert keys(loader(dataset), 2) == straight[2]
    assert keys(loader(dataset, workers=1), 2) == straight[2]
    assert len({tuple(epoch) for epoch in straight}) == 3
    assert keys(loader(dataset, seed=1), 0) != straight[0]


def test_every_flip_is_equally_likely():
    sampler = EpochSampler(8000, shuffle=False, seed=0, flips=True)
    counts = torch.bincount(torch.tensor([code for _, code, _ in sampler]), minlength=8)
    assert counts.min() > 850
    assert counts.max() < 1150


_PEAK_OF_A_RUN = """
import resource, sys
from pathlib import Path
import torch
import kdnet.data.loading
from kdnet.data.subjects import find_subjects
from kdnet.data.loading import build_loader, prepare
from kdnet.data.preprocessing import Preprocessing

torch.set_num_threads(1)
root, cache, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
description, subjects = find_subjects(root)
modalities = tuple(description.modalities)
preprocessing = Preprocessing(description, modalities, None, (64, 64, 64))
dataset = prepare(subjects[:count], preprocessing, cache, 2, progress=False)
for _ in range(2):
    for batch in build_loader(dataset, 2, shuffle=True, seed=0, flips=True, workers=0):
        batch["image"].sum()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_subjects(tmp_path):
    root = generate_phantoms(tmp_path / "p", subjects=40, seed=0, progress=False)
    application = Path(kdnet.data.loading.__file__).parents[2]

    def peak(count):
        arguments = [sys.executable, "-c", _PEAK_OF_A_RUN, root, tmp_path / str(count), str(count)]
        environment = os.environ | {"PYTHONPATH": str(application)}
        run = subprocess.run(arguments, env=environment, capture_output=True, check=True)
        return int(run.stdout) / 1024

    # 32 more subjects are 132 MiB on the grid; kept in memory they would show.
    assert peak(40) - peak(8) < 60


def test_a_subject_whose_file_was_removed_is_prepared_again(subjects, preprocessing, tmp_path):
    dataset = prepare(subjects, preprocessing, tmp_path / "cache", 1, progress=False)
    before = dataset[1]["image"].clone()
    next((tmp_path / "cache").glob("*/*_00001-*.safetensors")).unlink()
    assert torch.equal(dataset[1]["image"], before)


def test_prepared_subjects_know_what_their_files_are_like(subjects, preprocessing, tmp_path):
    dataset = prepare(subjects, preprocessing, tmp_path / "cache", 1, progress=False)
    shares = [
        [read_volume(s.images[m]).astype(bool).mean() for m in ("t1", "t1ce")] for s in subjects
    ]
    assert dataset.typical("nonzero") == pytest.approx(np.median(shares, axis=0))
    assert dataset.typical("spacing") == (1.0, 1.0, 1.0)
    none = prepare([], preprocessing, tmp_path / "cache", 1, progress=False)
    assert none.typical("spacing") == ()


def test_flips_leave_order_and_random_numbers_alone():
    def sampler(flips):
        return [*zip(*EpochSampler(20, shuffle=True, seed=0, flips=flips), strict=True)]

    order, codes, draws = sampler(flips=True)
    assert sampler(flips=False) == [order, (0,) * 20, draws]
    assert len({*codes}) > 1
    assert len({*draws}) == 20


def test_bits_of_a_flip_code_are_axes():
    volume = torch.rand(1, 2, 3, 4)
    assert torch.equal(flip(volume, 0), volume)
    assert torch.equal(flip(volume, 1), volume.flip(1))
    assert torch.equal(flip(volume, 6), volume.flip(2, 3))
    assert torch.equal(flip(volume[0], 2, 2), volume[0].flip(2))


@pytest.mark.parametrize(
    ("size", "per_epoch", "replicas", "each"), [(10, 0, 4, 3), (4, 9, 2, 5), (2, 0, 8, 1)]
)
def test_processes_share_an_epoch_in_equal_parts(size, per_epoch, replicas, each):
    def parts(shuffle):
        chosen = {"shuffle": shuffle, "seed": 0, "flips": False, "per_epoch": per_epoch}
        samplers = [
            EpochSampler(size, **chosen, replicas=replicas, rank=rank) for rank in range(replicas)
        ]
        assert [len(sampler) for sampler in samplers] == [len(list(s)) for s in samplers]
        return [[index for index, *_ in sampler] for sampler in samplers]

    training = parts(shuffle=True)
    assert {len(part) for part in training} == {each}
    assert {index for part in training for index in part} == set(range(size))
    # Validation is neither shortened nor made longer.
    assert sorted(n for part in parts(shuffle=False) for n in part) == list(range(size))


@pytest.mark.parametrize("count", [3, 10, 25])
def test_an_epoch_has_as_many_samples_as_asked_for(count):
    sampler = EpochSampler(10, shuffle=True, seed=0, flips=False, per_epoch=count)
    indices = [index for index, *_ in sampler]
    assert len(indices) == len(sampler) == count
    times = [indices.count(index) for index in range(10)]
    assert max(times) - min(times) <= 1
    whole = [index for index, *_ in EpochSampler(10, shuffle=True, seed=0, flips=False)]
    assert indices[:10] == whole[:count]


def test_batches_say_which_samples_have_a_label():
    samples = [
        {"image": torch.zeros(1, 2, 2, 2), "name": "a", "label": torch.ones(1, 2, 2, 2)},
        {"image": torch.zeros(1, 2, 2, 2), "name": "b"},
    ]
    loader = build_loader(samples, 2, shuffle=False, seed=0, flips=False, workers=0, mixed=True)
    batch = next(iter(loader))
    assert batch["labelled"].tolist() == [True, False]
    assert batch["label"].sum((1, 2, 3, 4)).tolist() == [8, 0]
    alone = build_loader(samples[1:], 1, shuffle=False, seed=0, flips=False, workers=0)
    assert "label" not in next(iter(alone))
