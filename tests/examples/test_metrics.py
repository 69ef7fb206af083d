import math
import warnings

import numpy as np
import pytest
import torch
from monai.metrics.hausdorff_distance import compute_hausdorff_distance
from monai.metrics.surface_dice import compute_surface_dice
from scipy import ndimage

from kdnet.evaluation.metrics import (
    bounding_box,
    dice,
    image_diagonal,
    surface_scores,
)

EMPTY = np.zeros((4, 4, 4), dtype=bool)


def hd95(*masks_and_spacing):
    return surface_scores(*masks_and_spacing)[0]


def surface_dice(*masks_and_spacing):
    return surface_scores(*masks_and_spacing)[1]


def block(shape, *slices):
    mask = np.zeros(shape, dtype=bool)
    mask[slices] = True
    return mask


def reference_hd95(prediction, reference, spacing):
    """Independent of MONAI: scipy's exact distance transform, surfaces by erosion."""

    def directed(source, destination):
        def surface(mask):
            return mask & ~ndimage.binary_erosion(mask)

        distances = ndimage.distance_transform_edt(~surface(destination), sampling=spacing)
        return np.percentile(distances[surface(source)], 95)

    return max(directed(prediction, reference), directed(reference, prediction))


def test_dice_of_half_overlapping_blocks():
    left = block((4, 4, 4), slice(0, 2))  # 32 voxels
    middle = block((4, 4, 4), slice(1, 3))  # 32 voxels, 16 of them shared
    assert dice(left, middle) == 0.5


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [(EMPTY, EMPTY, 1.0), (~EMPTY, EMPTY, 0.0), (EMPTY, ~EMPTY, 0.0), (~EMPTY, ~EMPTY, 1.0)],
)
def test_dice_of_empty_and_full_masks(prediction, reference, expected):
    assert dice(prediction, reference) == expected


def test_hd95_of_two_voxels_is_their_distance_in_mm():
    one = block((8, 8, 8), 1, 1, 1)
    other = block((8, 8, 8), 4, 5, 1)  # 3 and 4 voxels away
    assert hd95(one, other, (1.0, 1.0, 1.0)) == pytest.approx(5.0)
    assert hd95(one, other, (2.0, 0.5, 9.0)) == pytest.approx(math.hypot(6.0, 2.0))


def test_hd95_of_equal_masks_is_zero():
    assert hd95(~EMPTY, ~EMPTY, (1.0, 1.0, 1.0)) == 0.0


def test_hd95_of_two_empty_masks_is_zero():
    assert hd95(EMPTY, EMPTY, (1.0, 1.0, 1.0)) == 0.0


@pytest.mark.parametrize("swap", [False, True])
def test_one_empty_mask_costs_the_diagonal_of_a_brats_volume(swap):
    shape = (240, 240, 155)
    masks = [np.zeros(shape, dtype=bool), block(shape, 7, 7, 7)]
    if swap:
        masks.reverse()
    assert hd95(*masks, (1.0, 1.0, 1.0)) == pytest.approx(373.13, abs=0.005)


def test_diagonal_follows_the_spacing():
    assert image_diagonal((3, 4, 12), (1.0, 1.0, 1.0)) == pytest.approx(13.0)
    assert image_diagonal((3, 4, 12), (2.0, 2.0, 2.0)) == pytest.approx(26.0)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.5, 1.0, 3.0)])
@pytest.mark.parametrize("seed", range(4))
def test_hd95_equals_scipys_distance_transform(seed, spacing):
    noise = np.random.default_rng(seed).normal(size=(2, 20, 18, 16))
    blobs = [ndimage.gaussian_filter(volume, 2) > 0.02 for volume in noise]
    assert hd95(*blobs, spacing) == pytest.approx(reference_hd95(*blobs, spacing), rel=1e-5)


def test_hd95_counts_a_surface_at_the_border_of_the_volume():
    left = block((6, 6, 6), slice(0, 2))
    whole = np.ones((6, 6, 6), dtype=bool)
    expected = reference_hd95(left, whole, (1.0, 1.0, 1.0))
    assert hd95(left, whole, (1.0, 1.0, 1.0)) == pytest.approx(expected)


def reference_surface_scores(prediction, reference, spacing, tolerance):
    """MONAI's own metrics, without any crop of ours."""
    masks = [torch.from_numpy(mask)[None, None] for mask in (prediction, reference)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*always_return_as_numpy", FutureWarning)
        distance = compute_hausdorff_distance(
            *masks, include_background=True, percentile=95, spacing=spacing
        )
        surface = compute_surface_dice(
            *masks, class_thresholds=[tolerance], include_background=True, spacing=spacing
        )
    return float(distance), float(surface)


@pytest.mark.parametrize("tolerance", [0.5, 1.0, 2.5])
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.5, 1.0, 3.0)])
def test_crop_to_both_masks_changes_no_surface_score(spacing, tolerance):
    noise = np.random.default_rng(5).normal(size=(2, 14, 12, 10))
    blobs = [ndimage.gaussian_filter(volume, 1.5) > 0.02 for volume in noise]
    for place in (slice(20, 34), slice(0, 14), slice(46, 60)):  # inside, at either border
        masks = [np.zeros((60, 40, 30), dtype=bool) for _ in blobs]
        for mask, blob in zip(masks, blobs, strict=True):
            mask[place, 7:19, 20:30] = blob
        expected = reference_surface_scores(*masks, spacing, tolerance)
        assert surface_scores(*masks, spacing, tolerance) == pytest.approx(expected, rel=1e-6)


def test_surface_dice_of_shifted_plates_by_hand():
    one = block((12, 8, 8), 3, slice(2, 6), slice(2, 6))  # 16 voxels, all of them surface
    for shift, expected in ((0, 1.0), (1, 1.0), (2, 0.0)):
        assert surface_dice(one, np.roll(one, shift, 0), (1.0, 1.0, 1.0)) == expected
    assert surface_dice(one, np.roll(one, 1, 0), (2.0, 1.0, 1.0)) == 0.0
    # Of two plates side by side, one is found: 16 + 16 close of 16 + 32.
    both = one | np.roll(one, 6, 0)
    assert surface_dice(one, both, (1.0, 1.0, 1.0)) == pytest.approx(32 / 48)


def test_surface_dice_of_empty_masks():
    spacing = (1.0, 1.0, 1.0)
    assert surface_dice(EMPTY, EMPTY, spacing) == 1.0
    assert surface_dice(~EMPTY, EMPTY, spacing) == surface_dice(EMPTY, ~EMPTY, spacing) == 0.0


def test_masks_cut_from_an_image_are_penalised_with_its_diagonal():
    assert surface_scores(EMPTY, ~EMPTY, (1.0, 1.0, 1.0), diagonal=373.13) == (373.13, 0.0)


def test_bounding_box_keeps_its_margin_inside():
    mask = block((10, 10, 10), slice(0, 2), slice(4, 6), 9)
    assert bounding_box(mask, 1) == (slice(0, 3), slice(3, 7), slice(8, 11))
    assert mask[bounding_box(mask, 1)].shape == (3, 4, 2)
    assert EMPTY[bounding_box(EMPTY, 3)].size == 0


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(4, 4, 4\).*\(2, 4, 4\)"):
        dice(EMPTY, EMPTY[:2])
    with pytest.raises(ValueError, match="same grid"):
        hd95(EMPTY, EMPTY[:2], (1.0, 1.0, 1.0))
