from dataclasses import replace

import numpy as np
import pytest

from kdnet.data.description import load_description
from kdnet.evaluation.postprocessing import remove_small, rule_of

BRATS = load_description("brats2021")
LGG = load_description("lgg")
UNIT = (1.0, 1.0, 1.0)


def volume(**counts):
    """So many voxels of each class, side by side."""
    classes = np.zeros(4096, dtype=np.uint8)
    start = 0
    for name, count in counts.items():
        classes[start : start + count] = int(name[1:])
        start += count
    return classes.reshape(16, 16, 16)


def counts(classes):
    return {int(index): int((classes == index).sum()) for index in np.unique(classes) if index}


def test_small_enhancing_tumour_becomes_core():
    cleaned = remove_small(volume(c1=50, c2=100, c3=499), BRATS, UNIT)
    assert counts(cleaned) == {1: 549, 2: 100}
    assert cleaned.dtype == np.uint8


def test_enhancing_tumour_of_the_limit_stays():
    before = volume(c1=50, c3=500)
    assert remove_small(before, BRATS, UNIT) is before


def test_limit_is_a_volume_so_that_voxels_may_have_any_size():
    before = volume(c3=70)
    assert remove_small(before, BRATS, (2.0, 2.0, 2.0)) is before  # 560 mm³
    assert counts(remove_small(before, BRATS, (2.0, 1.0, 2.0))) == {1: 70}
    nominal = replace(BRATS, spacing="nominal")
    assert counts(remove_small(before, nominal, (2.0, 2.0, 2.0))) == {1: 70}
    assert remove_small(before, nominal, (9.0, 9.0, 9.0), smallest_volume=70) is before


def test_label_map_given_is_not_changed():
    before = volume(c3=10)
    remove_small(before, BRATS, UNIT)
    assert counts(before) == {3: 10}


def test_data_set_of_one_region_loses_its_small_components():
    classes = np.zeros((12, 12, 12), dtype=np.uint8)
    classes[0:3, 0:3, 0:3] = 1  # 27 voxels
    classes[3, 3, 3] = 1  # touches them at a corner
    classes[9, 9, 9:11] = 1
    cleaned = remove_small(classes, LGG, UNIT, smallest_volume=28)
    assert counts(cleaned) == {1: 28}
    assert counts(remove_small(classes, LGG, UNIT, smallest_volume=29)) == {}


def test_empty_prediction_stays_empty():
    for description in (BRATS, LGG):
        assert counts(remove_small(volume(), description, UNIT)) == {}


def test_rule_follows_the_nesting_of_the_regions():
    rule = rule_of(BRATS)
    assert (rule.region, rule.classes, rule.replacement, rule.whole) == ("ET", (3,), 1, True)
    two = replace(BRATS, regions={"WT": (1, 2, 3), "TC": (1, 3)})
    assert (rule_of(two).region, rule_of(two).replacement) == ("TC", 2)
    apart = replace(BRATS, regions={"core": (1, 3), "oedema": (2,)})
    assert (rule_of(apart).region, rule_of(apart).classes) == (None, (1, 2, 3))


def test_rule_in_words_names_class_and_unit():
    words = rule_of(BRATS).words(BRATS)
    assert words == "ET below 500 mm³ in a whole case becomes necrotic core."
    assert rule_of(LGG).words(LGG) == "Connected tumour below 500 voxels becomes background."


@pytest.mark.parametrize("limit", [-1.0, float("nan"), float("inf")])
def test_limit_that_makes_no_sense_is_refused(limit):
    with pytest.raises(ValueError, match="must be 0 or more mm³"):
        remove_small(volume(c3=1), BRATS, UNIT, smallest_volume=limit)
