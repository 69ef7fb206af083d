import math
import os
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from kdnet.data.description import load_description
from kdnet.data.preprocessing import Preprocessing
from kdnet.data.subjects import find_subjects
from kdnet.errors import UserError
from kdnet.evaluation.scoring import (
    Score,
    evaluate,
    grid_spacing,
    native_classes,
    read_scores,
    score_case,
    write_scores,
)

REAL = Path(os.environ.get("PRIVDISTILL_DATA", "../shared/data")) / "brats2021"
DESCRIPTION = load_description("brats2021")
SHAPE = (16, 16, 12)
AFFINE = np.array([[-2.0, 0, 0, 5], [0, -1.0, 0, 9], [0, 0, 3.0, -4], [0, 0, 0, 1]])


def label_values(seed=0):
    """Nested blocks: oedema around core around enhancing tumour, in BraTS values."""
    values = np.zeros(SHAPE, dtype=np.int16)
    values[4:12, 4:12, 2:10] = 2
    values[6:10, 6:10, 4:8] = 1
    values[6:10, 6:10, 4:6] = 4
    return np.roll(values, seed, axis=0)


def write_subject(root, name, values):
    values = values.astype(np.int16)
    folder = root / name
    folder.mkdir(parents=True)
    for modality in ("flair", "t1", "t1ce", "t2"):
        intensities = (values * 10 + 5).astype(np.int16)
        nib.save(nib.Nifti1Image(intensities, AFFINE), folder / f"{name}_{modality}.nii.gz")
    nib.save(nib.Nifti1Image(values, AFFINE), folder / f"{name}_seg.nii.gz")


@pytest.fixture
def subjects(tmp_path):
    write_subject(tmp_path / "data", "BraTS2021_00001", label_values())
    write_subject(tmp_path / "data", "BraTS2021_00002", np.where(label_values(1) == 2, 2, 0))
    return find_subjects(tmp_path / "data")[1]


def preprocessing(description=DESCRIPTION, grid=SHAPE, crop=None):
    return Preprocessing(description, ("t1ce",), crop, grid)


def perfect(labels):
    """A network that knows the answer: large logits of the right classes."""
    remaining = list(labels)

    def predict(image):
        classes = torch.from_numpy(remaining.pop(0).astype(np.int64))
        one_hot = torch.nn.functional.one_hot(classes, 4).movedim(-1, 0)[None]
        return 20.0 * one_hot

    return predict


def class_indices(values):
    return np.where(values == 4, 3, values).astype(np.uint8)


def one(scores, **wanted):
    (found,) = [s for s in scores if all(getattr(s, k) == v for k, v in wanted.items())]
    return found


def test_regions_of_a_shifted_prediction_by_hand():
    reference = np.zeros((4, 4, 4), dtype=np.uint8)
    predicted = np.zeros((4, 4, 4), dtype=np.uint8)
    reference[0], predicted[0] = 3, 3  # 16 voxels of ET, found
    reference[1] = 2  # 16 voxels of oedema, missed
    predicted[3, 0, 0] = 1  # one voxel of core too many
    scores = score_case(
        predicted,
        reference,
        DESCRIPTION,
        role="student",
        case="a",
        space="grid",
        spacing=(1.0, 1.0, 1.0),
    )
    assert [score.region for score in scores] == ["ET", "TC", "WT"]
    assert [score.dice for score in scores] == [1.0, 32 / 33, 32 / 49]
    assert [(s.reference_voxels, s.predicted_voxels) for s in scores] == [
        (16, 16),
        (16, 17),
        (32, 17),
    ]


def test_nominal_spacing_gives_voxels_and_says_so():
    reference = np.zeros((8, 4, 4), dtype=np.uint8)
    predicted = reference.copy()
    reference[1, 1, 1], predicted[4, 1, 1] = 3, 3
    nominal = replace(DESCRIPTION, spacing="nominal")
    arguments = {"role": "student", "case": "a", "space": "native", "spacing": (2.0, 1.0, 1.0)}
    (in_mm, *_) = score_case(predicted, reference, DESCRIPTION, **arguments)
    (in_voxels, *_) = score_case(predicted, reference, nominal, **arguments)
    assert (in_mm.hd95, in_mm.hd95_unit) == (pytest.approx(6.0), "mm")
    assert (in_voxels.hd95, in_voxels.hd95_unit) == (pytest.approx(3.0), "voxel")
    assert in_mm.nsd == 0.0
    assert math.isnan(in_voxels.nsd)  # a millimetre is not known
    # Whole volumes are cut to the tumour before they are compared; the penalty is not.
    (missed, *_) = score_case(np.zeros_like(reference), reference, DESCRIPTION, **arguments)
    assert missed.hd95 == pytest.approx(math.hypot(16, 4, 4))


def test_cases_without_any_tumour_agree():
    empty = np.zeros((4, 4, 4), dtype=np.uint8)
    arguments = {"role": "student", "case": "a", "space": "grid", "spacing": (1.0, 1.0, 1.0)}
    for score in score_case(empty, empty, DESCRIPTION, **arguments):
        assert (score.dice, score.hd95, score.nsd) == (1.0, 0.0, 1.0)
        assert math.isnan(score.dice_reference_present)
    with pytest.raises(ValueError, match="same grid"):
        score_case(empty, empty[:2], DESCRIPTION, **arguments)


def test_grid_spacing_is_the_size_of_a_merged_voxel():
    brats = preprocessing(crop=(128, 128, 128), grid=(64, 64, 64))
    assert grid_spacing(brats, (240, 240, 155), (1.0, 1.0, 1.0)) == (2.0, 2.0, 2.0)
    whole = preprocessing(crop=None, grid=(64, 64, 32))
    assert grid_spacing(whole, (128, 128, 24), (2.0, 2.0, 5.0)) == (4.0, 4.0, 3.75)


def test_perfect_network_scores_one_everywhere(subjects):
    labels = [class_indices(label_values()), class_indices(np.where(label_values(1) == 2, 2, 0))]
    scores = evaluate(
        perfect(labels),
        subjects,
        preprocessing(),
        DESCRIPTION,
        "softmax",
        role="teacher",
        fold=2,
        seed=7,
    )
    assert len(scores) == 2 * 3 * 2
    assert {score.dice for score in scores} == {1.0}
    assert {score.hd95 for score in scores} == {0.0}
    assert {score.nsd for score in scores} == {1.0}
    assert {(s.modalities, s.fold, s.seed) for s in scores} == {("t1ce", 2, 7)}
    without = one(scores, case="BraTS2021_00002", region="ET", space="native")
    assert math.isnan(without.dice_reference_present)


def test_predictions_lie_on_the_original_grid_with_the_original_labels(subjects, tmp_path):
    labels = [class_indices(label_values()), class_indices(label_values())]
    folder = tmp_path / "predictions"
    evaluate(
        perfect(labels),
        subjects,
        preprocessing(),
        DESCRIPTION,
        "softmax",
        role="student",
        prediction_folder=folder,
    )
    written = nib.load(folder / "BraTS2021_00001_seg.nii.gz")
    np.testing.assert_array_equal(np.asarray(written.dataobj), label_values())
    np.testing.assert_array_equal(written.affine, AFFINE)
    assert written.get_data_dtype() == np.uint8
    assert sorted(path.name for path in folder.iterdir()) == [
        "BraTS2021_00001_seg.nii.gz",
        "BraTS2021_00002_seg.nii.gz",
    ]


def test_native_label_maps_are_scored_before_and_after_postprocessing(subjects):
    labels = [class_indices(label_values()), class_indices(label_values())]
    scores = evaluate(
        perfect(labels),
        subjects,
        preprocessing(),
        DESCRIPTION,
        "softmax",
        role="student",
        smallest_volume=500.0,
    )
    # 32 voxels of 2 x 1 x 3 mm are predicted as ET, 192 mm³; the second subject has none.
    wanted = {"case": "BraTS2021_00002", "region": "ET", "space": "native"}
    off = one(scores, postprocessing="off", **wanted)
    on = one(scores, postprocessing="on", **wanted)
    assert (off.dice, off.predicted_voxels) == (0.0, 32)
    assert (on.dice, on.predicted_voxels) == (1.0, 0)
    assert one(scores, **(wanted | {"space": "grid"})).postprocessing == "off"
    assert len(scores) == 2 * 3 * 3


def test_tumour_outside_the_crop_counts_as_missed_in_native_space_only(subjects):
    inside = preprocessing(crop=(8, 8, 12), grid=(8, 8, 12))
    label = class_indices(label_values())[4:12, 4:12]
    scores = evaluate(
        perfect([label]), subjects[:1], inside, DESCRIPTION, "softmax", role="student"
    )
    assert one(scores, region="WT", space="grid").dice == 1.0
    assert one(scores, region="WT", space="native").dice == 1.0  # the tumour fits the crop
    narrow = preprocessing(crop=(4, 8, 12), grid=(4, 8, 12))
    label = class_indices(label_values())[6:10, 4:12]
    scores = evaluate(
        perfect([label]), subjects[:1], narrow, DESCRIPTION, "softmax", role="student"
    )
    assert one(scores, region="WT", space="grid").dice == 1.0
    # Half of the 8 slabs lie in the crop: 2 * 0.5 / (1 + 0.5).
    assert one(scores, region="WT", space="native").dice == pytest.approx(2 / 3)


def test_overlapping_regions_paint_background_outside_the_crop():
    logits = torch.full((1, 3, 4, 4, 4), 20.0)
    inside = preprocessing(crop=(4, 4, 4), grid=(4, 4, 4))
    classes = native_classes(logits, (8, 8, 8), inside, DESCRIPTION, "sigmoid")
    assert (classes[2:6, 2:6, 2:6] == 3).all()
    assert (classes > 0).sum() == 64


def test_sigmoid_decides_at_one_half():
    logits = torch.full((1, 3, 4, 4, 4), -0.01)
    logits[:, 2] = 0.01  # WT alone
    whole = preprocessing(crop=None, grid=(4, 4, 4))
    assert (native_classes(logits, (4, 4, 4), whole, DESCRIPTION, "sigmoid") == 2).all()


def test_output_that_is_not_finite_is_refused(subjects):
    with pytest.raises(UserError, match="BraTS2021_00001: expected finite"):
        evaluate(
            lambda image: torch.full((1, 4, *SHAPE), math.nan),
            subjects,
            preprocessing(),
            DESCRIPTION,
            "softmax",
            role="student",
        )


def test_scores_survive_the_csv(tmp_path):
    scores = [
        Score("student", 'a,"b', "ET", "native", 0.1 + 0.2, math.nan, 373.13, "mm", 0, 12),
        Score("teacher", "c", "WT", "grid", 1.0, 1.0, 0.0, "voxel", 5, 5, 0.5, "on", "t1+t2", 2, 3),
    ]
    write_scores(tmp_path / "scores.csv", scores)
    first, second = read_scores(tmp_path / "scores.csv")
    assert math.isnan(first.dice_reference_present)
    assert math.isnan(first.nsd)
    known = {"dice_reference_present": 0.0, "nsd": 0.0}
    assert replace(first, **known) == replace(scores[0], **known)
    assert second == scores[1]
    assert [path.name for path in tmp_path.iterdir()] == ["scores.csv"]


def test_scores_of_an_older_run_get_the_defaults(tmp_path):
    path = tmp_path / "scores.csv"
    path.write_text(
        "role,case,region,space,dice,dice_reference_present,hd95,hd95_unit,reference_voxels,"
        "predicted_voxels\nstudent,a,ET,native,0.5,,3.0,mm,0,7\n"
    )
    (score,) = read_scores(path)
    assert (score.dice, score.reference_voxels, score.predicted_voxels) == (0.5, 0, 7)
    assert math.isnan(score.nsd)
    assert (score.postprocessing, score.modalities, score.fold, score.seed) == ("off", "", 0, 0)


def test_value_outside_its_choices_is_explained(tmp_path):
    path = tmp_path / "scores.csv"
    write_scores(path, [Score("a", "b", "ET", "native", 1.0, 1.0, 0.0, "mm", 1, 1)])
    path.write_text(path.read_text().replace(",off,", ",perhaps,"))
    with pytest.raises(UserError, match="'perhaps' is none of off, on"):
        read_scores(path)


def test_missing_or_foreign_scores_are_explained(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_scores(tmp_path / "scores.csv")
    (tmp_path / "scores.csv").write_text("case,dice\na,1\n")
    with pytest.raises(UserError, match="expected the columns role, case"):
        read_scores(tmp_path / "scores.csv")


@pytest.mark.skipif(not REAL.is_dir(), reason="needs real subjects, see PRIVDISTILL_DATA")
def test_reference_of_a_real_subject_survives_grid_and_back(tmp_path):
    """The most that a perfect network can reach at 64^3: the borders of 2 mm voxels are lost."""
    description, subjects = find_subjects(REAL)
    (subject,) = [subject for subject in subjects if subject.name == "BraTS2021_01476"]
    brats = Preprocessing(description, ("t1ce",), description.crop, description.grid)
    on_grid = brats(subject)["label"][0].numpy()
    scores = evaluate(
        perfect([on_grid]),
        [subject],
        brats,
        description,
        "softmax",
        role="student",
        prediction_folder=tmp_path,
    )
    assert one(scores, region="WT", space="grid").dice == 1.0
    native = one(scores, region="WT", space="native")
    assert 0.94 < native.dice < 1.0
    assert native.hd95 < 2.0
    written = nib.load(tmp_path / "BraTS2021_01476_seg.nii.gz")
    original = nib.load(subject.segmentation.path)
    np.testing.assert_array_equal(written.affine, original.affine)
    assert written.shape == original.shape == (240, 240, 155)
    assert set(np.unique(np.asarray(written.dataobj))) <= {0, 1, 2, 4}
