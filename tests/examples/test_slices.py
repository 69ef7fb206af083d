"""Which cases and slices a page shows, how they are kept, and what pictures become of them."""

import base64
import io
import json

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from invented_runs import invented_scores, scores_of, write_plan
from kdnet.data.description import load_description
from kdnet.errors import UserError
from kdnet.results.slices import STACK_LIMIT, choose_cases, cut_slices, label_colour, load_slices
from kdnet.results.stored import read_folder


def test_shown_cases_are_the_extremes_and_the_median_of_the_gain():
    scores = invented_scores(cases=5)
    chosen = choose_cases(scores, "student", "baseline")
    assert [why.split()[0] for why in chosen.values()] == ["lowest", "median", "highest"]
    assert all("difference between student and baseline" in why for why in chosen.values())
    named = choose_cases(scores, "student", "baseline", {"student": "S", "baseline": "B"}.get)
    assert all("difference between S and B" in why for why in named.values())
    touched = scores.assign(dice=0.0, postprocessing="on")
    assert choose_cases(pd.concat([scores, touched]), "student", "baseline") == chosen


def test_shown_cases_without_a_student_come_from_the_baseline():
    scores = scores_of("baseline", {"a": 0.1, "b": 0.5, "c": 0.3, "d": 0.4})
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


def test_slices_surround_the_one_of_the_strip(root):
    kept = load_slices(root / "slices.json")
    classes = load_description("phantom").classes
    assert kept["legend"] == [[name, label_colour(n)] for n, name in enumerate(classes) if n]
    assert len(kept["cases"]) == len(kept["viewer"]) == 3
    for case, sheets in zip(kept["cases"], kept["viewer"], strict=True):
        labels = ["reference", "baseline", *["student"] * (case["name"] != "Case_2"), "teacher"]
        titles = [tile["title"] for tile in case["strip"]]
        assert titles == ["t1ce", "flair", "t1", "t2", *labels]
        assert [tile["note"] for tile in case["strip"]][:2] == ["seen by the student", ""]
        assert [name for name, _ in sheets["labels"]] == labels
        assert sheets["modality"] == "t1ce"
        assert sheets["numbers"] == [*range(2, 10)]  # labels in 4 to 7, two more on both sides
        assert sheets["numbers"][sheets["start"]] == case["number"] == 4
        assert case["total"] == 10


def test_slices_are_cut_once_and_need_no_images_afterwards(root, tmp_path):
    before = (root / "slices.json").read_bytes()
    assert cut_slices(read_folder(root)) == ""
    assert (root / "slices.json").read_bytes() == before
    for name in ("plan.json", "scores.csv", "config.yaml", "description.json"):
        (tmp_path / name).write_bytes((root / name).read_bytes())
    assert "label maps were not kept" in cut_slices(read_folder(tmp_path))


def pixels(source):
    encoded = source.removeprefix("data:image/png;base64,")
    return Image.open(io.BytesIO(base64.b64decode(encoded)))


def cut_case(folder, grey, labels):
    """One subject on the identity and a plan that scored it; its strip and its sheets."""
    root = folder / "plan"
    write_plan(root, load_description("brats2021"), cases=1)
    for path in (folder / "data").glob("*/*.nii.gz"):
        volume = labels if path.name.endswith("_seg.nii.gz") else grey
        nib.save(nib.Nifti1Image(volume, np.eye(4)), path)
    for path in root.glob("units/*/*/predictions/*"):
        nib.save(nib.Nifti1Image(labels, np.eye(4)), path)
    cut_slices(read_folder(root))
    kept = load_slices(root / "slices.json")
    return kept["cases"][0]["strip"], kept["viewer"][0]


def test_slices_are_turned_to_the_radiological_view_and_laid_out_as_sheets(tmp_path):
    # Under the identity a voxel at the patient's right front has the largest x and y.
    labels = np.zeros((12, 10, 6), dtype=np.int16)
    labels[10, 8, 2] = 1
    strip, sheets = cut_case(tmp_path, np.full(labels.shape, 9, dtype=np.int16), labels)
    assert (sheets["numbers"], sheets["start"], sheets["columns"]) == ([1, 2, 3, 4, 5], 2, 3)
    assert pixels(sheets["image"]).size == (3 * 12, 2 * 10)
    layer = np.asarray(pixels(dict(sheets["labels"])["reference"]).convert("RGBA"))[..., 3]
    (row,), (column,) = np.nonzero(layer)
    assert (row, column - 2 * 12) == (1, 1)  # third tile, top left: front, patient's right
    grey, over = (np.asarray(pixels(strip[n]["source"]).convert("RGB")) for n in (0, 4))
    (row,), (column,) = np.nonzero((grey != over).any(axis=2))
    assert (row, column) == (1, 1)
    assert strip[0]["ratio"] == pytest.approx(12 / 10)


def test_large_volumes_are_thinned(tmp_path):
    labels = np.zeros((300, 20, 120), dtype=np.uint8)
    labels[100:200, 5:10, 10:110] = 1
    strip, sheets = cut_case(tmp_path, np.full(labels.shape, 9, dtype=np.uint8), labels)
    assert len(sheets["numbers"]) <= STACK_LIMIT
    assert pixels(strip[0]["source"]).size == (sheets["width"], sheets["height"]) == (150, 10)


@pytest.mark.parametrize(
    "change",
    [
        lambda kept: kept | {"cases": 3},
        lambda kept: kept | {"cases": [kept["cases"][0] | {"total": "many"}]},
        lambda kept: kept | {"cases": [kept["cases"][0] | {"strip": [{}]}]},
        lambda kept: {"legend": []},
    ],
)
def test_pictures_that_do_not_fit_are_one_clear_error(root, tmp_path, change):
    kept = json.loads((root / "slices.json").read_text())
    (tmp_path / "slices.json").write_text(json.dumps(change(kept)))
    with pytest.raises(UserError, match=r"slices\.json is damaged"):
        load_slices(tmp_path / "slices.json")
