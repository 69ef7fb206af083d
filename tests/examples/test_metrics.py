import math

import numpy as np
import pytest
from scipy import ndimage

from kdnet.evaluation.metrics import (
    bounding_box,
    dice,
    image_diagonal,
    surface_scores,
)

EMPTY = np.zeros((4, 4, 4), dtype=bool)


def block(shape, *slices):
    mask = np.zeros(shape, dtype=bool)
    mask[slices] = True
    return mask


def reference_scores(prediction, reference, spacing, tolerance=1.0):
    """Independent of MONAI: scipy's exact distance transform, surfaces by erosion."""

    def directed(source, destination):
        surfaces = [mask & ~ndimage.binary_erosion(mask) for mask in (source, destination)]
        distances = ndimage.distance_transform_edt(~surfaces[1], sampling=spacing)
        return distances[surfaces[0]]

    ways = directed(prediction, reference), directed(reference, prediction)
    close = np.concatenate(ways) <= tolerance + 1e-6
    return max(np.percentile(way, 95) for way in ways), close.mean()


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
    assert surface_scores(one, other, (1.0, 1.0, 1.0))[0] == pytest.approx(5.0)
    assert surface_scores(one, other, (2.0, 0.5, 9.0))[0] == pytest.approx(math.hypot(6.0, 2.0))


@pytest.mark.parametrize("mask", [EMPTY, ~EMPTY])
def test_equal_masks_have_the_best_scores(mask):
    assert surface_scores(mask, mask, (1.0, 1.0, 1.0)) == (0.0, 1.0)


@pytest.mark.parametrize("step", [1, -1])
def test_one_empty_mask_costs_the_diagonal_of_a_brats_volume(step):
    shape = (240, 240, 155)
    masks = [np.zeros(shape, dtype=bool), block(shape, 7, 7, 7)][::step]
    farthest, close = surface_scores(*masks, (1.0, 1.0, 1.0))
    assert farthest == pytest.approx(373.13, abs=0.005)
    assert close == 0.0
    # What is cut from an image is penalised with the image's diagonal.
    cut = surface_scores(EMPTY, ~EMPTY, (1.0, 1.0, 1.0), diagonal=373.13)
    assert cut == (373.13, 0.0)


def test_diagonal_follows_the_spacing():
    assert image_diagonal((3, 4, 12), (1.0, 1.0, 1.0)) == pytest.approx(13.0)
    assert image_diagonal((3, 4, 12), (2.0, 2.0, 2.0)) == pytest.approx(26.0)


@pytest.mark.parametrize("tolerance", [0.6, 1.0, 2.6])
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.5, 1.0, 3.0)])
@pytest.mark.parametrize("place", [slice(20, 34), slice(0, 14), slice(46, 60)])
def test_surface_scores_equal_scipys_distance_transform_also_at_a_border(place, spacing, tolerance):
    noise = np.random.default_rng(5).normal(size=(2, 14, 12, 10))
    masks = [np.zeros((60, 40, 30), dtype=bool) for _ in noise]
    for mask, volume in zip(masks, noise, strict=True):
        mask[place, 7:19, 20:30] = ndimage.gaussian_filter(volume, 1.5) > 0.02
    expected = reference_scores(*masks, spacing, tolerance)
    assert surface_scores(*masks, spacing, tolerance) == pytest.approx(expected, rel=1e-5)


def test_surface_dice_of_shifted_plates_by_hand():
    one = block((12, 8, 8), 3, slice(2, 6), slice(2, 6))  # 16 voxels, all of them surface
    for shift, expected in ((0, 1.0), (1, 1.0), (2, 0.0)):
        assert surface_scores(one, np.roll(one, shift, 0), (1.0,) * 3)[1] == expected
    assert surface_scores(one, np.roll(one, 1, 0), (2.0, 1.0, 1.0))[1] == 0.0
    # Of two plates side by side, one is found: 16 + 16 close of 16 + 32.
    both = one | np.roll(one, 6, 0)
    assert surface_scores(one, both, (1.0, 1.0, 1.0))[1] == pytest.approx(32 / 48)


def test_bounding_box_keeps_its_margin_inside():
    mask = block((10, 10, 10), slice(0, 2), slice(4, 6), 9)
    assert bounding_box(mask) == (slice(0, 3), slice(3, 7), slice(8, 11))
    assert mask[bounding_box(mask)].shape == (3, 4, 2)
    assert EMPTY[bounding_box(EMPTY)].size == 0
