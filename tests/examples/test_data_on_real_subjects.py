"""The readers on real data, where it is at hand (see `real_data` in conftest.py)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from kdnet.data.checks import check_subjects
from kdnet.data.description import load_description
from kdnet.data.loading import build_loader, prepare
from kdnet.data.preprocessing import Preprocessing
from kdnet.data.subjects import find_subjects
from kdnet.data.targets import predict_classes, to_regions, to_target


def test_twelve_brats_subjects_are_found_and_are_sound(real_data):
    description, subjects = find_subjects(real_data("brats2021"))
    assert description.name == "BraTS 2020/2021"
    assert len(subjects) == 12
    assert check_subjects(description, subjects[:2], workers=2, progress=False) == []


def test_a_brats_subject_survives_the_way_to_the_grid_and_back(real_data):
    description, subjects = find_subjects(real_data("brats2021"))
    preprocessing = Preprocessing(description, ("t1ce",), description.crop, description.grid)
    sample = preprocessing(subjects[0])
    native = preprocessing.native_label(subjects[0])
    assert native.classes.shape == (240, 240, 155)
    target = to_target(sample["label"][None].long(), description, "softmax")
    back = preprocessing.to_native(target[0], native.classes.shape)
    predicted = predict_classes(back[None], description, "softmax")[0]
    mask, reference = (to_regions(c, description)["WT"] for c in (predicted, native.classes))
    # What halving the resolution costs a perfect prediction.
    assert 2 * (mask & reference).sum() / (mask.sum() + reference.sum()) > 0.85


def test_two_brats_subjects_are_known_to_lack_enhancing_tumour(real_data):
    description, subjects = find_subjects(real_data("brats2021"))
    preprocessing = Preprocessing(description, ("t1ce",), None, description.grid)
    lacking = [s for s in subjects if s.name in {"BraTS2021_01480", "BraTS2021_01483"}]
    assert len(lacking) == 2
    for subject in lacking:
        regions = to_regions(preprocessing.native_label(subject).classes, description)
        assert not regions["ET"].any()
        assert regions["WT"].any()


@pytest.fixture
def lgg(real_data):
    return find_subjects(real_data("lgg"), load_description(Path("lgg")))


def test_lgg_is_read_by_its_description_alone(lgg, tmp_path):
    description, subjects = lgg
    assert len(subjects) == 70
    assert description.spacing == "nominal"
    assert list(description.modalities) == ["t1", "t1ce", "flair"]
    some = subjects[:4]
    assert check_subjects(description, some, workers=2, progress=False) == []
    # Some of these images have a background of 1 or 76.
    assert description.background == "noise"
    preprocessing = Preprocessing(
        description, tuple(description.modalities), description.crop, description.grid
    )
    dataset = prepare(some, preprocessing, tmp_path, 2, progress=False)
    loader = build_loader(dataset, 2, shuffle=False, seed=0, flips=False, workers=0)
    batch = next(iter(loader))
    assert batch["image"].shape == (2, 3, 64, 64, 32)
    assert torch.isfinite(batch["image"]).all()
    assert batch["label"].unique().tolist() == [0, 1]


def test_lgg_volumes_of_any_number_of_slices_come_back(lgg):
    description, subjects = lgg
    preprocessing = Preprocessing(description, ("t1ce",), None, description.grid)
    for subject in subjects[:5]:
        native = preprocessing.native_label(subject)
        back = preprocessing.to_native(torch.zeros(2, 64, 64, 32), native.classes.shape)
        assert tuple(back.shape[1:]) == native.classes.shape
        assert set(np.unique(native.classes)) == {0, 1}
