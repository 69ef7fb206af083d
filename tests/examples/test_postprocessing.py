from dataclasses import replace

import numpy as np
import pytest

from kdnet.data.description import load_description
from kdnet.evaluation.postprocessing import remove_small

BRATS = load_description("brats2021")
LGG = load_description("lgg")
UNIT = (1.0, 1.0, 1.0)


def volume(**counts):
    """So many voxels of each class, side by side."""
    values = [int(name[1:]) for name, count in counts.items() for _ in range(count)]
    return np.array(values + [0] * (4096 - len(values)), dtype=np.uint8).reshape(16, 16, 16)


def counts(classes):
    return {int(index): int((classes == index).sum()) for index in np.unique(classes) if index}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"c1": 50, "c2": 100, "c3": 499}, {1: 549, 2: 100}),
        ({"c1": 50, "c3": 500}, {1: 50, 3: 500}),
        ({}, {}),
    ],
)
def test_small_enhancing_tumour_becomes_core(before, after):
    given = volume(**before)
    cleaned = remove_small(given, BRATS, UNIT)
    assert counts(cleaned) == after
    assert cleaned.dtype == np.uint8
    assert np.array_equal(given, volume(**before))


@pytest.mark.parametrize(
    ("spacing", "nominal", "stays"),
    [((2.0, 2.0, 2.0), False, True), ((2.0, 1.0, 2.0), False, False), ((9.0,) * 3, True, False)],
)
def test_limit_is_a_volume_so_that_voxels_may_have_any_size(spacing, nominal, stays):
    description = replace(BRATS, spacing="nominal") if nominal else BRATS
    cleaned = remove_small(volume(c3=70), description, spacing)
    assert counts(cleaned) == ({3: 70} if stays else {1: 70})


def test_data_set_of_one_region_loses_its_small_components():
    classes = np.zeros((12, 12, 12), dtype=np.uint8)
    classes[0:3, 0:3, 0:3] = 1  # 27 voxels
    classes[3, 3, 3] = 1  # touches them at a corner
    classes[9, 9, 9:11] = 1
    assert counts(remove_small(classes, LGG, UNIT, smallest_volume=28)) == {1: 28}
    assert counts(remove_small(classes, LGG, UNIT, smallest_volume=29)) == {}


def test_rule_follows_the_nesting_of_the_regions():
    before = volume(c1=3, c2=5, c3=7)
    two = replace(BRATS, regions={"WT": (1, 2, 3), "TC": (1, 3)})
    assert counts(remove_small(before, two, UNIT)) == {2: 15}
    apart = replace(BRATS, regions={"core": (1, 3), "oedema": (2,)})
    assert counts(remove_small(before, apart, UNIT)) == {}
