import math
import re
from dataclasses import replace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from written import MODALITIES, write_volume

from invented_runs import scores_of
from kdnet.data.description import load_description
from kdnet.data.preprocessing import Preprocessing
from kdnet.data.subjects import find_subjects
from kdnet.errors import UserError
from kdnet.evaluation.inference import native_classes
from kdnet.evaluation.scoring import (
    COLUMNS,
    evaluate,
    gather_scores,
    grid_spacing,
    read_scores,
    score_case,
    write_scores,
)

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
    for ending in (*MODALITIES, "seg"):
        volume = values if ending == "seg" else 10 * values + 5
        write_volume(root / name / f"{name}_{ending}.nii.gz", volume.astype(np.int16), AFFINE)


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
    for name, value in wanted.items():
        scores = scores[scores[name] == value]
    (found,) = scores.itertuples()
    return found


def scored(predicted, reference, description=DESCRIPTION, spacing=(1.0, 1.0, 1.0)):
    return score_case(predicted, reference, description, row="student", case="a", spacing=spacing)


def score(network, subjects, preprocessed=None, **options):
    unit = options.pop("unit", {"row": "student"})
    preprocessed = preprocessed or preprocessing()
    return evaluate(network, subjects, preprocessed, "softmax", unit=unit, **options)


def test_regions_of_a_shifted_prediction_by_hand():
    reference = np.zeros((4, 4, 4), dtype=np.uint8)
    predicted = reference.copy()
    reference[0], predicted[0] = 3, 3  # 16 voxels of ET, found
    reference[1] = 2  # 16 voxels of oedema, missed
    predicted[3, 0, 0] = 1  # one voxel of core too many
    scores = scored(predicted, reference)
    assert [line["region"] for line in scores] == ["ET", "TC", "WT"]
    assert [line["dice"] for line in scores] == [1.0, 32 / 33, 32 / 49]
    voxels = [(line["reference_voxels"], line["predicted_voxels"]) for line in scores]
    assert voxels == [(16, 16), (16, 17), (32, 17)]


def test_nominal_spacing_gives_voxels_and_says_so():
    reference = np.zeros((8, 4, 4), dtype=np.uint8)
    predicted = reference.copy()
    reference[1, 1, 1], predicted[4, 1, 1] = 3, 3
    nominal = replace(DESCRIPTION, spacing="nominal")
    (in_mm, *_) = scored(predicted, reference, spacing=(2.0, 1.0, 1.0))
    (in_voxels, *_) = scored(predicted, reference, nominal, spacing=(2.0, 1.0, 1.0))
    assert (in_mm["hd95"], in_mm["hd95_unit"]) == (pytest.approx(6.0), "mm")
    assert (in_voxels["hd95"], in_voxels["hd95_unit"]) == (pytest.approx(3.0), "voxel")
    assert in_mm["nsd"] == 0.0
    assert math.isnan(in_voxels["nsd"])  # a millimetre is not known
    # Whole volumes are cut to the tumour before they are compared; the penalty is not.
    (missed, *_) = scored(np.zeros_like(reference), reference, spacing=(2.0, 1.0, 1.0))
    assert missed["hd95"] == pytest.approx(math.hypot(16, 4, 4))


def test_cases_without_any_tumour_agree():
    empty = np.zeros((4, 4, 4), dtype=np.uint8)
    for line in scored(empty, empty):
        assert (line["dice"], line["hd95"], line["nsd"]) == (1.0, 0.0, 1.0)
        assert math.isnan(line["dice_reference_present"])
    with pytest.raises(UserError, match="same grid"):
        scored(empty, empty[:2])


def test_where_the_reference_is_present_missed_regions_count_and_false_ones_do_not():
    tumour, empty = np.full((4, 4, 4), 3, dtype=np.uint8), np.zeros((4, 4, 4), dtype=np.uint8)
    for missed, false in zip(scored(empty, tumour), scored(tumour, empty), strict=True):
        assert missed["dice"] == missed["dice_reference_present"] == false["dice"] == 0.0
        assert math.isnan(false["dice_reference_present"])


def test_grid_spacing_is_the_size_of_a_merged_voxel():
    brats = preprocessing(crop=(128, 128, 128), grid=(64, 64, 64))
    assert grid_spacing(brats, (240, 240, 155), (1.0, 1.0, 1.0)) == (2.0, 2.0, 2.0)
    whole = preprocessing(crop=None, grid=(64, 64, 32))
    assert grid_spacing(whole, (128, 128, 24), (2.0, 2.0, 5.0)) == (4.0, 4.0, 3.75)


def test_perfect_network_scores_one_everywhere_and_its_label_maps_are_the_reference(
    subjects, tmp_path
):
    labels = [class_indices(label_values()), class_indices(np.where(label_values(1) == 2, 2, 0))]
    unit = {"row": "teacher", "fold": 2, "seed": 7, "labelled": 5, "against": "baseline"}
    unit["modalities"] = "t1ce"
    scores = score(perfect(labels), subjects, unit=unit, prediction_folder=tmp_path / "maps")
    assert len(scores) == 2 * 3 * 2
    assert [*scores.columns] == [*COLUMNS]
    expected = {"dice": 1.0, "hd95": 0.0, "nsd": 1.0} | unit
    for name, value in expected.items():
        assert {*scores[name]} == {value}
    without = one(scores, case="BraTS2021_00002", region="ET", space="native")
    assert math.isnan(without.dice_reference_present)
    written = nib.load(tmp_path / "maps" / "BraTS2021_00001_seg.nii.gz")
    np.testing.assert_array_equal(np.asarray(written.dataobj), label_values())
    np.testing.assert_array_equal(written.affine, AFFINE)
    assert written.get_data_dtype() == np.uint8
    assert len([*(tmp_path / "maps").iterdir()]) == 2


def test_native_label_maps_are_scored_before_and_after_postprocessing(subjects):
    labels = [class_indices(label_values()), class_indices(label_values())]
    scores = score(perfect(labels), subjects, smallest_volume=500.0)
    # 32 voxels of 2 x 1 x 3 mm are predicted as ET, 192 mm³; the second subject has none.
    wanted = {"case": "BraTS2021_00002", "region": "ET", "space": "native"}
    off = one(scores, postprocessing="off", **wanted)
    on = one(scores, postprocessing="on", **wanted)
    assert (off.dice, off.predicted_voxels) == (0.0, 32)
    assert (on.dice, on.predicted_voxels) == (1.0, 0)
    assert one(scores, **(wanted | {"space": "grid"})).postprocessing == "off"
    assert len(scores) == 2 * 3 * 3


@pytest.mark.parametrize(("wide", "native"), [(8, 1.0), (4, 2 / 3)])
def test_tumour_outside_the_crop_counts_as_missed_in_native_space_only(subjects, wide, native):
    # Of 8 slabs with tumour all or half lie in the crop: 2 * 0.5 / (1 + 0.5).
    crop = (wide, 8, 12)
    label = class_indices(label_values())[8 - wide // 2 : 8 + wide // 2, 4:12]
    scores = score(perfect([label]), subjects[:1], preprocessing(crop=crop, grid=crop))
    assert one(scores, region="WT", space="grid").dice == 1.0
    assert one(scores, region="WT", space="native").dice == pytest.approx(native)


def test_without_grid_and_crop_both_spaces_are_one(subjects):
    reference = class_indices(label_values())
    scores = score(perfect([reference, reference]), subjects, preprocessing(grid=None))
    grid, native = (scores[scores["space"] == space] for space in ("grid", "native"))
    assert grid["dice"].tolist()[:3] == [1.0] * 3 != grid["dice"].tolist()[3:]
    pd.testing.assert_frame_equal(
        native.reset_index(drop=True), grid.assign(space="native").reset_index(drop=True)
    )


def test_sigmoid_decides_at_one_half_and_paints_background_outside_the_crop():
    inside = preprocessing(crop=(4, 4, 4), grid=(4, 4, 4))
    for low, expected in ((20.0, 3), (-0.01, 2)):
        logits = torch.full((1, 3, 4, 4, 4), low)
        logits[:, 2] = abs(low)  # WT, with or without the regions inside it
        classes = native_classes(logits, (8, 8, 8), inside, "sigmoid")
        assert (classes[2:6, 2:6, 2:6] == expected).all()
        assert (classes > 0).sum() == 64


def test_output_that_is_not_finite_is_refused(subjects):
    with pytest.raises(UserError, match="BraTS2021_00001: expected finite"):
        score(lambda image: torch.full((1, 4, *SHAPE), math.nan), subjects)


def test_scores_survive_the_csv(tmp_path):
    odd = scores_of("student", {'a,"b': 0.1 + 0.2}, dice_reference_present=math.nan, seed=3)
    scores = pd.concat([odd, scores_of("teacher", {"c": 1.0}, nsd=0.5, postprocessing="on")])
    write_scores(tmp_path / "scores.csv", scores)
    pd.testing.assert_frame_equal(
        read_scores(tmp_path / "scores.csv"), scores.reset_index(drop=True), check_exact=True
    )
    assert [path.name for path in tmp_path.iterdir()] == ["scores.csv"]


@pytest.mark.parametrize(
    ("column", "text"),
    [
        ("postprocessing", "perhaps"),
        ("dice", "1.5"),
        ("dice", "inf"),
        ("hd95", "-1"),
        ("hd95", "=1+1"),
        ("fold", ""),
        ("fold", "0.5"),
        ("case", ""),
    ],
)
def test_value_that_cannot_be_is_named_with_its_line(tmp_path, column, text):
    path = tmp_path / "scores.csv"
    scores = scores_of("student", {"a": 0.5, "b": 0.5}).astype(object)
    scores.loc[1, column] = text
    write_scores(path, scores)
    with pytest.raises(UserError, match=f"line 3: {column} is '{re.escape(text)}'"):
        read_scores(path)


def test_missing_foreign_and_damaged_tables_are_explained(tmp_path):
    path = tmp_path / "scores.csv"
    with pytest.raises(UserError, match="no such file"):
        read_scores(path)
    write_scores(path, scores_of("student", {"a": 0.5}))
    whole = path.read_text()
    cut, twice = whole[: whole.rindex(",")], whole + whole.splitlines()[1]
    said = {cut: "as long as the header", twice: "two lines are about row student"}
    foreign = dict.fromkeys(["", "case,dice\na,1\n", "row\n" * 3, "\0\0", "{"], r"scores\.csv")
    for content, message in (foreign | said).items():
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            read_scores(path)


def test_tables_of_units_are_gathered(tmp_path):
    assert gather_scores(tmp_path).empty
    for seed in (0, 1):
        folder = tmp_path / "units" / "student" / f"fold0-seed{seed}"
        folder.mkdir(parents=True)
        write_scores(folder / "scores.csv", scores_of("student", {"a": 0.5}, seed=seed))
    assert gather_scores(tmp_path)["seed"].tolist() == [0, 1]
    assert len(read_scores(tmp_path / "scores.csv")) == 2


def test_reference_of_a_real_subject_survives_grid_and_back(real_data, tmp_path):
    """The most that a perfect network can reach at 64^3: the borders of 2 mm voxels are lost."""
    description, subjects = find_subjects(real_data("brats2021"))
    (subject,) = [subject for subject in subjects if subject.name == "BraTS2021_01476"]
    brats = Preprocessing(description, ("t1ce",), description.crop, description.grid)
    on_grid = brats(subject)["label"][0].numpy()
    scores = score(perfect([on_grid]), [subject], brats, prediction_folder=tmp_path)
    assert one(scores, region="WT", space="grid").dice == 1.0
    native = one(scores, region="WT", space="native")
    assert 0.94 < native.dice < 1.0
    assert native.hd95 < 2.0
    written = nib.load(tmp_path / "BraTS2021_01476_seg.nii.gz")
    original = nib.load(subject.segmentation.path)
    np.testing.assert_array_equal(written.affine, original.affine)
    assert written.shape == original.shape == (240, 240, 155)
    assert set(np.unique(np.asarray(written.dataobj))) <= {0, 1, 2, 4}
