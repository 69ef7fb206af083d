"""Which cases and slices a report shows, and how they are kept."""

import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from invented_runs import ROLES, invented_scores, write_data, write_predictions
from kdnet.data.description import load_description
from kdnet.data.subjects import find_subjects
from kdnet.results.slices import STACK_LIMIT, choose_cases, load_slices, save_slices


def test_shown_cases_are_the_extremes_and_the_median():
    chosen = choose_cases(invented_scores(cases=5))
    assert [why.split()[0] for why in chosen.values()] == ["lowest", "median", "highest"]


def test_shown_cases_without_student_come_from_the_baseline():
    scores = [score for score in invented_scores(cases=3) if score.role == "baseline"]
    assert all("Dice of the baseline" in why for why in choose_cases(scores).values())


def test_slices_are_turned_to_the_radiological_view(tmp_path):
    # Under the identity a voxel at the patient's right front has the largest x and y.
    description = load_description("brats2021")
    labels = np.zeros((12, 10, 6), dtype=np.int16)
    labels[10, 8, 2] = 1
    grey = np.full(labels.shape, 9, dtype=np.int16)
    grey[0, 0, 0] = 10
    folder = tmp_path / "Case_0"
    folder.mkdir()
    for modality in ("flair", "t1", "t1ce", "t2"):
        nib.save(nib.Nifti1Image(grey, np.eye(4)), folder / f"Case_0_{modality}.nii")
    nib.save(nib.Nifti1Image(labels, np.eye(4)), folder / "Case_0_seg.nii")
    subjects = {s.name: s for s in find_subjects(tmp_path, description)[1]}
    path = tmp_path / "slices.npz"
    save_slices(path, subjects, description, tmp_path / "none", invented_scores(cases=1))
    _, (shown,) = load_slices(path)
    assert shown.position == (3, 6)
    (row,), (column,) = np.nonzero(shown.labels["reference"])
    assert (row, column) == (1, 1)  # top left: front, patient's right


def test_rows_of_a_cross_validation_are_compared_by_their_names():
    scores = invented_scores(cases=3, rows=("baseline", "kdnet"))
    chosen = choose_cases(scores, student="kdnet")
    assert all("difference between kdnet and baseline" in why for why in chosen.values())


def test_post_processed_scores_choose_nothing():
    scores = invented_scores(cases=3)
    touched = [replace(score, dice=0.0, postprocessing="on") for score in scores]
    assert choose_cases(scores + touched) == choose_cases(scores)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Three cases of which the label maps lie in two folders, as in a cross-validation."""
    root = tmp_path_factory.mktemp("slices")
    description = load_description("brats2021")
    names = [f"Case_{index}" for index in range(3)]
    labels = write_data(root / "data", names)
    write_predictions(root / "fold0", ROLES, names[:2], labels)
    write_predictions(root / "fold1", ("student",), names[2:], labels)
    subjects = {s.name: s for s in find_subjects(root / "data", description)[1]}
    folders = {name: root / ("fold1" if name == "Case_2" else "fold0") for name in names}
    save_slices(
        root / "slices.npz",
        subjects,
        description,
        folders,
        invented_scores(cases=3),
        rows=("student", "teacher"),
        modality="t1ce",
    )
    return load_slices(root / "slices.npz")


def test_label_maps_are_taken_from_the_folder_of_their_case(saved):
    _, cases = saved
    found = {case.name: list(case.labels) for case in cases}
    assert found["Case_2"] == ["reference", "student"]
    assert found["Case_0"] == ["reference", "student", "teacher"]


def test_stack_surrounds_the_slice_of_the_strip(saved):
    _, (case, *_) = saved
    assert case.stack.modality == "t1ce"
    assert case.stack.numbers == tuple(range(2, 10))  # labels in 4 to 7, two more on both sides
    shown = case.stack.numbers.index(case.position[0])
    assert np.array_equal(case.stack.labels["reference"][shown], case.labels["reference"])
    assert np.array_equal(case.stack.image[shown], case.images["t1ce"])


def test_class_names_are_kept(saved):
    assert saved[0] == tuple(load_description("brats2021").classes)


def test_large_volumes_are_thinned(tmp_path):
    description = load_description("brats2021")
    labels = np.zeros((300, 20, 120), dtype=np.uint8)
    labels[100:200, 5:10, 10:110] = 1
    grey = np.full(labels.shape, 9, dtype=np.uint8)
    folder = tmp_path / "data" / "Case_0"
    folder.mkdir(parents=True)
    nib.save(nib.Nifti1Image(grey, np.eye(4)), folder / "Case_0_t1ce.nii")
    nib.save(nib.Nifti1Image(labels, np.eye(4)), folder / "Case_0_seg.nii")
    subjects = {s.name: s for s in find_subjects(tmp_path / "data", description)[1]}
    path = tmp_path / "slices.npz"
    save_slices(path, subjects, description, tmp_path, invented_scores(cases=1))
    (case,) = load_slices(path)[1]
    assert len(case.stack.numbers) <= STACK_LIMIT
    assert case.stack.image.shape[1:] == (10, 150)
    assert case.images["t1ce"].shape == case.labels["reference"].shape == (10, 150)


def test_slices_of_older_runs_have_no_stack(saved, tmp_path):
    _, (case, *_) = saved
    facts = [{"name": "Case", "why": "", "position": [1, 9], "aspect": 1.0}]
    path = tmp_path / "slices.npz"
    image = {"0/image/t1ce": case.images["t1ce"]}
    texts = {"cases": np.array(json.dumps(facts)), "classes": np.array(json.dumps(["background"]))}
    np.savez(path, **image, **texts)
    assert load_slices(path)[1][0].stack is None
