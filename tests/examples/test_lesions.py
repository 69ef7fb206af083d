import nibabel as nib
import numpy as np
import pytest

from kdnet.data.description import load_description
from kdnet.data.subjects import ImageFile, Subject
from kdnet.errors import UserError
from kdnet.evaluation.lesions import score_folder, score_lesions

BRATS = load_description("brats2021")
LGG = load_description("lgg")
WHO = {"row": "student", "case": "a", "spacing": (1.0, 1.0, 1.0)}


def cubes(*corners, size=4):
    classes = np.zeros((20, 20, 20), dtype=np.uint8)
    for x, y, z in corners:
        classes[x : x + size, y : y + size, z : z + size] = 1
    return classes


def test_one_lesion_found_one_missed_one_false():
    reference = cubes((2, 2, 2), (12, 12, 12))
    predicted = cubes((2, 2, 3))  # 48 of 64 voxels shared: Dice 0.75, one voxel away
    predicted[18, 18, 18] = 1
    (score,) = score_lesions(predicted, reference, LGG, **WHO)
    assert (score["reference_lesions"], score["predicted_lesions"], score["matched"]) == (2, 2, 1)
    assert score["dice"] == pytest.approx(0.75 / 3)
    # Spacing of this data set is nominal; the diagonal is that of 20 voxels in each direction.
    assert score["hd95"] == pytest.approx((1.0 + 2 * 20 * 3**0.5) / 3)
    assert score["hd95_unit"] == "voxel"


def test_large_lesion_hides_a_missed_one_from_dice_alone():
    reference = cubes((0, 0, 0), size=12)
    predicted = reference.copy()
    reference[17, 17, 17] = 1
    (score,) = score_lesions(predicted, reference, LGG, **WHO)
    assert score["dice"] == 0.5  # the Dice of the region is above 0.999


def test_empty_masks():
    empty, tumour = cubes(), cubes((2, 2, 2))
    (nothing,) = score_lesions(empty, empty, LGG, **WHO)
    assert (nothing["dice"], nothing["hd95"], nothing["reference_lesions"]) == (1.0, 0.0, 0)
    for predicted, reference in ((empty, tumour), (tumour, empty)):
        (score,) = score_lesions(predicted, reference, LGG, **WHO)
        assert (score["dice"], score["matched"]) == (0.0, 0)
        assert score["hd95"] == pytest.approx(20 * 3**0.5)


def test_pairs_have_the_largest_sum_and_touch():
    # A stroke overlaps both cubes; the one that it fits less well has a partner of its own.
    reference = cubes((2, 2, 2), (2, 2, 8))
    predicted = cubes((2, 2, 3))
    predicted[2:6, 2:6, 7:12] = 1
    predicted[2:6, 2:6, 6] = 0
    (score,) = score_lesions(predicted, reference, LGG, **WHO)
    assert (score["reference_lesions"], score["predicted_lesions"], score["matched"]) == (2, 2, 2)
    (score,) = score_lesions(cubes((2, 2, 2)), cubes((12, 12, 12)), LGG, **WHO)
    assert (score["matched"], score["dice"]) == (0, 0.0)


def test_distances_follow_the_spacing():
    reference, predicted = 3 * cubes((2, 2, 2)), 3 * cubes((2, 2, 3))
    scores = score_lesions(predicted, reference, BRATS, **(WHO | {"spacing": (1.0, 1.0, 2.5)}))
    assert [score["region"] for score in scores] == ["ET", "TC", "WT"]
    assert {(score["hd95"], score["hd95_unit"]) for score in scores} == {(2.5, "mm")}


def test_folder_of_label_maps(tmp_path):
    path = tmp_path / "a_seg.nii.gz"
    nib.save(nib.Nifti1Image(cubes((2, 2, 2)), np.eye(4)), path)
    subject = Subject("a", {}, ImageFile(path))
    place = {"row": "kdnet", "fold": 2}
    (score,) = score_folder(tmp_path, [subject], LGG, **place).to_dict("records")
    assert (score["row"], score["case"], score["dice"], score["fold"]) == ("kdnet", "a", 1.0, 2)


def test_missing_label_map_is_named(tmp_path):
    subject = Subject("a", {}, ImageFile(tmp_path / "reference.nii.gz"))
    with pytest.raises(UserError, match=r"expected .*a_seg\.nii\.gz, found none"):
        score_folder(tmp_path, [subject], LGG, row="kdnet")
