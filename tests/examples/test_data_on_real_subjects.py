"""The readers on real data, where it is at hand (see `real_data` in conftest.py)."""

from pathlib import Path

import pytest
import torch

from kdnet.data.checks import check_subjects
from kdnet.data.description import load_description
from kdnet.data.loading import build_loader, prepare
from kdnet.data.preprocessing import Preprocessing
from kdnet.data.subjects import find_subjects


def test_twelve_brats_subjects_are_found_and_are_sound(real_data):
    description, subjects = find_subjects(real_data("brats2021"))
    assert description.name == "BraTS 2020/2021"
    assert len(subjects) == 12
    assert check_subjects(description, subjects[:2], workers=2, progress=False) == []


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
