"""Which cases and slices a page shows, how they are kept, and what pictures become of them."""

import base64
import io

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from invented_runs import invented_scores, scores_of, write_plan
from kdnet.data.description import load_description
from kdnet.errors import UserError
from kdnet.results.slices import (
    STACK_LIMIT,
    ShownCase,
    choose_cases,
    cut_slices,
    label_colour,
    load_slices,
    pictures,
    save_slices,
    tiles,
)
from kdnet.results.stored import read_folder


def test_shown_cases_are_the_extremes_and_the_median_of_the_gain():
    scores = invented_scores(cases=5)
    chosen = choose_cases(scores, "student", "baseline")
    assert [why.split()[0] for why in chosen.values()] == ["lowest", "median", "highest"]
    assert all("difference between student and baseline" in why for why in chosen.values())
    touched = scores.assign(dice=0.0, postprocessing="on")
    assert choose_cases(pd.concat([scores, touched]), "student", "baseline") == chosen


def test_shown_cases_without_a_student_come_from_the_baseline():
    scores = scores_of("baseline", {"a": 0.1, "b": 0.5, "c": 0.3})
    chosen = choose_cases(scores, "", "baseline")
    assert [*chosen] == ["a", "c", "b"]
    assert all("Dice of the baseline" in why for why in chosen.values())
    assert choose_cases(scores.iloc[:0], "", "") == {}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two seeds of two folds; one case lacks the student's label map."""
    folder = tmp_path_factory.mktemp("slices") / "plan"
    write_plan(folder, load_description("phantom"), folds=2, cases=2, seeds=(0, 1))
    for seed in (0, 1):
        unit = folder / "units" / "student" / f"fold1-seed{seed}"
        (unit / "predictions" / "Case_2_seg.nii.gz").unlink()
    assert cut_slices(read_folder(folder)) == ""
    return folder


def test_stack_surrounds_the_slice_of_the_strip(root):
    classes, cases = load_slices(root / "slices.npz")
    assert classes == tuple(load_description("phantom").classes)
    assert len(cases) == 3
    for case in cases:
        assert case.modality == "t1ce"
        assert case.numbers == tuple(range(2, 10))  # labels in 4 to 7, two more on both sides
        assert (case.numbers[case.start], case.total) == (4, 10)
        assert [*case.others] == ["flair", "t1", "t2"]
        student = ["student"] * (case.name != "Case_2")
        assert [*case.labels] == ["reference", "teacher", "baseline", *student]


def test_slices_are_cut_once_and_need_no_images_afterwards(root, tmp_path):
    before = (root / "slices.npz").read_bytes()
    results = read_folder(root)
    assert cut_slices(results) == ""
    assert (root / "slices.npz").read_bytes() == before
    for name in ("plan.json", "scores.csv", "config.yaml", "description.json"):
        (tmp_path / name).write_bytes((root / name).read_bytes())
    assert "label maps were not kept" in cut_slices(read_folder(tmp_path))


def write_case(folder, grey, labels):
    """One subject on the identity, and a plan that scored it."""
    root = folder / "plan"
    write_plan(root, load_description("brats2021"), cases=1)
    for path in (folder / "data").glob("*/*_t*.nii.gz"):
        nib.save(nib.Nifti1Image(grey, np.eye(4)), path)
    nib.save(nib.Nifti1Image(grey, np.eye(4)), folder / "data/Case_0/Case_0_flair.nii.gz")
    nib.save(nib.Nifti1Image(labels, np.eye(4)), folder / "data/Case_0/Case_0_seg.nii.gz")
    for path in root.glob("units/*/*/predictions/*"):
        path.rename(path.with_name("Case_0_seg.nii.gz"))
        nib.save(nib.Nifti1Image(labels, np.eye(4)), path)
    cut_slices(read_folder(root))
    (case,) = load_slices(root / "slices.npz")[1]
    return case


def test_slices_are_turned_to_the_radiological_view(tmp_path):
    # Under the identity a voxel at the patient's right front has the largest x and y.
    labels = np.zeros((12, 10, 6), dtype=np.int16)
    labels[10, 8, 2] = 1
    case = write_case(tmp_path, np.full(labels.shape, 9, dtype=np.int16), labels)
    (row,), (column,) = np.nonzero(case.labels["reference"][case.start])
    assert (case.numbers[case.start], case.total) == (3, 6)
    assert (row, column) == (1, 1)  # top left: front, patient's right


def test_large_volumes_are_thinned(tmp_path):
    labels = np.zeros((300, 20, 120), dtype=np.uint8)
    labels[100:200, 5:10, 10:110] = 1
    case = write_case(tmp_path, np.full(labels.shape, 9, dtype=np.uint8), labels)
    assert len(case.numbers) <= STACK_LIMIT
    assert case.stack.shape[1:] == case.others["t1"].shape == (10, 150)


def shown(**changes):
    """Three slices of 2 x 3 pixels; class 1 at the top left of the second."""
    labels = np.zeros((3, 2, 3), dtype=np.uint8)
    labels[1, 0, 0] = 1
    values = {
        "name": "Case",
        "why": "because",
        "modality": "t1ce",
        "numbers": (4, 5, 6),
        "start": 1,
        "total": 9,
        "aspect": 2.0,
        "stack": np.full((3, 2, 3), 100, dtype=np.uint8),
        "labels": {"reference": labels, "student": labels},
        "others": {"t2": np.full((2, 3), 7, dtype=np.uint8)},
    }
    return ShownCase(**(values | changes))


def picture(source):
    return Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,"))))


def test_strip_shows_what_the_student_sees_the_reference_and_the_rows():
    strip = tiles(shown(), ["t1ce"], ["student", "teacher"])
    assert [tile["title"] for tile in strip] == ["t1ce", "reference", "student"]
    assert [tile["note"] for tile in strip] == ["seen by the student", "", ""]
    assert strip[0]["width"] == 3 / (2 * 2.0)
    colours = picture(strip[1]["source"])
    assert colours.getpixel((0, 0)) != (100, 100, 100)
    assert colours.getpixel((1, 1)) == (100, 100, 100)


def test_sheets_read_back_as_they_were(tmp_path):
    save_slices(tmp_path / "slices.npz", ("background", "core"), [shown()])
    page = pictures(tmp_path / "slices.npz", ["t1ce"], ["student"])
    (sheet,) = page["viewer"]
    assert page["legend"] == [("core", label_colour(1))]
    assert (sheet["columns"], sheet["numbers"], sheet["start"]) == (2, (4, 5, 6), 1)
    assert picture(sheet["image"]).size == (6, 4)
    layer = picture(dict(sheet["labels"])["reference"]).convert("RGBA")
    assert layer.getpixel((3, 0))[3] == 255  # second tile, top left
    assert layer.getpixel((0, 0))[3] == 0


def test_cases_beyond_the_budget_are_left_out_and_named(tmp_path, monkeypatch):
    save_slices(tmp_path / "slices.npz", ("background",), [shown(), shown(name="Other")])
    monkeypatch.setattr("kdnet.results.slices.VIEWER_BUDGET", 700)
    page = pictures(tmp_path / "slices.npz", [], ["student"])
    assert (len(page["viewer"]), page["left_out"]) == (1, ["Other"])
    assert len(page["strips"]) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"aspect": 0.0},
        {"start": 3},
        {"numbers": (1,)},
        {"stack": np.zeros((3, 2), dtype=np.uint8)},
        {"labels": {"reference": np.zeros((3, 2, 2), dtype=np.uint8)}},
        {"others": {"t2": np.zeros((2, 3), dtype=np.float32)}},
    ],
)
def test_pictures_that_do_not_fit_are_one_clear_error(tmp_path, changes):
    save_slices(tmp_path / "slices.npz", (), [shown(**changes)])
    with pytest.raises(UserError, match=r"slices\.npz is damaged"):
        load_slices(tmp_path / "slices.npz")
