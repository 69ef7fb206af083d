"""Preprocessing: crop, z-score, grid, and the way back, on numbers worked out by hand."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.transforms import CenterSpatialCrop, SpatialPad
from written import write_volume

from kdnet.data.description import load_description
from kdnet.data.preprocessing import Preprocessing, central_window
from kdnet.data.subjects import ImageFile, Subject, find_subjects

BRATS = replace(load_description(Path("brats2021")), crop=(8, 8, 8), grid=(4, 4, 4))


def preprocessing(**settings) -> Preprocessing:
    chosen = {"description": BRATS, "modalities": ("t1ce",), "crop": (8, 8, 8), "grid": (4, 4, 4)}
    return Preprocessing(**(chosen | settings))


def one_image(folder, volume) -> Subject:
    return Subject("A", {"t1ce": ImageFile(write_volume(folder / "a.nii", volume))})


def test_shapes_types_and_order_of_modalities(brats_folder):
    _, subjects = find_subjects(brats_folder)
    both = preprocessing(modalities=("t1ce", "flair"))(subjects[0])
    assert both["name"] == "BraTS2021_00000"
    assert both["image"].shape == (2, 4, 4, 4)
    assert both["image"].dtype == torch.float32
    assert type(both["image"]) is torch.Tensor
    assert both["label"].shape == (1, 4, 4, 4)
    assert both["label"].dtype == torch.uint8
    flair = preprocessing(modalities=("flair",))(subjects[0])
    assert torch.equal(both["image"][1:], flair["image"])
    label = preprocessing(crop=None, grid=(12, 12, 12))(subjects[0])["label"]
    assert [(label == n).sum() for n in (1, 3)] == [2**3, 4**3 - 2**3]


def test_z_score_is_taken_over_non_zero_voxels_of_the_crop(tmp_path):
    volume = np.full((12, 12, 12), 900, dtype=np.int16)
    volume[2:10, 2:10, 2:10] = 0
    volume[2:6, 2:10, 2:10] = 10
    volume[2:4, 2:10, 2:10] = 30
    subject = one_image(tmp_path, volume)
    image = preprocessing(grid=(8, 8, 8))(subject)["image"][0]
    # Mean 20, deviation 10; the background stays 0, and the 900 outside the crop do not count.
    assert image[:, 0, 0].tolist() == pytest.approx([1, 1, -1, -1, 0, 0, 0, 0])


def test_z_score_before_the_crop_sees_the_whole_volume(tmp_path):
    volume = np.zeros((12, 12, 12), dtype=np.int16)
    volume[4:8, 4:8, 4:8] = 10
    volume[0, :4, :4] = 50
    volume[0, 4, :16] = 50
    subject = one_image(tmp_path, volume)
    image = preprocessing(grid=(8, 8, 8), normalise="before_crop")(subject)["image"]
    values = np.array([10] * 64 + [50] * 28)
    assert image[0, 4, 4, 4].item() == pytest.approx((10 - values.mean()) / values.std(), rel=1e-5)


def test_where_the_background_is_noise_all_voxels_count(tmp_path):
    noise = replace(BRATS, background="noise")
    volume = np.zeros((8, 8, 8), dtype=np.int16)
    volume[4:] = 10
    subject = one_image(tmp_path, volume)
    image = preprocessing(description=noise, grid=(8, 8, 8))(subject)["image"][0]
    # Mean 5, deviation 5: what is exactly 0 is a voxel like others.
    assert image[:, 0, 0].tolist() == [-1] * 4 + [1] * 4
    assert preprocessing(description=noise).fingerprint() != preprocessing().fingerprint()


def test_an_empty_or_constant_modality_gives_no_nan(tmp_path):
    for value in (0, 7):
        subject = one_image(tmp_path, np.full((8, 8, 8), value, dtype=np.int16))
        assert torch.count_nonzero(preprocessing()(subject)["image"]) == 0


@pytest.mark.parametrize("resample", ["trilinear", "area"])
def test_halving_averages_eight_voxels(tmp_path, resample):
    volume = np.random.default_rng(0).normal(size=(8, 8, 8)).astype(np.float32)
    subject = one_image(tmp_path, volume)
    image = preprocessing(resample=resample)(subject)["image"][0].numpy()
    z_scores = (volume - volume.mean()) / volume.std()
    expected = z_scores.reshape(4, 2, 4, 2, 4, 2).mean(axis=(1, 3, 5))
    np.testing.assert_allclose(image, expected, atol=1e-5)


def test_a_volume_smaller_than_the_crop_is_padded_in_the_middle(tmp_path):
    volume = np.zeros((4, 4, 4), dtype=np.float32)
    volume[0] = 1.0
    volume[1] = 3.0
    image = preprocessing(grid=(8, 8, 8))(one_image(tmp_path, volume))["image"][0]
    assert image[:, 4, 4].tolist() == [0, 0, -1, 1, 0, 0, 0, 0]
    assert torch.count_nonzero(image[:, :2]) == 0


@pytest.mark.parametrize(("size", "crop"), [(240, 128), (155, 128), (5, 2), (6, 3), (4, 9), (3, 8)])
def test_the_central_window_is_that_of_monai(size, crop):
    volume = torch.arange(1, size + 1).reshape(1, size).float()
    cropped = torch.zeros(1, crop)
    whole, cut = central_window(size, crop)
    cropped[:, cut] = volume[:, whole]
    expected = SpatialPad(crop)(CenterSpatialCrop(crop)(volume))
    assert torch.equal(cropped, torch.Tensor(expected))


@pytest.mark.parametrize("shape", [(8, 8, 8), (11, 8, 6), (12, 7, 9)])
def test_what_is_cropped_comes_back_to_its_place(tmp_path, shape):
    classes = np.random.default_rng(0).integers(0, 3, size=shape).astype(np.uint8)
    image = ImageFile(write_volume(tmp_path / "t1ce.nii", classes + 1))
    subject = Subject("A", {"t1ce": image}, ImageFile(write_volume(tmp_path / "seg.nii", classes)))
    process = preprocessing(grid=(8, 8, 8))
    one_hot = torch.nn.functional.one_hot(process(subject)["label"].long()[0], 4).movedim(-1, 0)
    native = process.to_native(one_hot.float(), shape)
    inside = tuple(central_window(n, 8)[0] for n in shape)
    outside = np.ones(shape, dtype=bool)
    outside[inside] = False
    np.testing.assert_array_equal(native.argmax(0).numpy()[inside], classes[inside])
    assert (native[0].numpy()[outside] == 1).all()
    assert not native[1:].numpy()[:, outside].any()


def test_the_way_back_interpolates_between_the_centres_of_cells():
    cells = torch.tensor([0.0, 1.0]).reshape(1, 2, 1, 1).expand(1, 2, 2, 2)
    native = preprocessing(crop=None).to_native(cells, (4, 4, 4))
    assert native[0, :, 0, 0].tolist() == [0.0, 0.25, 0.75, 1.0]


def test_regions_are_zero_outside_the_crop_if_asked():
    native = preprocessing().to_native(torch.ones(3, 4, 4, 4), (10, 8, 8), outside=0.0)
    assert native.shape == (3, 10, 8, 8)
    assert native[:, 0].sum() == 0
    assert native[:, 1:9].min() == 1
    whole = preprocessing(crop=None).to_native(torch.full((2, 4, 4, 4), 0.25), (7, 9, 5))
    assert torch.equal(whole, torch.full((2, 7, 9, 5), 0.25))


@pytest.mark.parametrize(
    "change",
    [
        {"modalities": ("t1",)},
        {"crop": None},
        {"grid": (5, 4, 4)},
        {"normalise": "before_crop"},
        {"resample": "area"},
        {"description": replace(BRATS, labels={0: 0, 1: 2, 2: 1, 4: 3})},
    ],
)
def test_every_setting_changes_the_fingerprint(change):
    assert preprocessing(**change).fingerprint() != preprocessing().fingerprint()
    assert preprocessing().fingerprint() == preprocessing().fingerprint()
