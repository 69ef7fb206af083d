"""Checks: each kind of damage is found, with its file and reason, all at once."""

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from kdnet.data.checks import Problem, check_subjects, raise_for_problems
from kdnet.data.subjects import find_subjects
from kdnet.errors import UserError


def problems_in(root: Path, **settings) -> list[Problem]:
    description, subjects = find_subjects(root)
    return check_subjects(description, subjects, workers=2, progress=False, **settings)


def only_problem(root: Path, **settings) -> Problem:
    (problem,) = problems_in(root, **settings)
    return problem


@pytest.fixture
def folder(brats_folder: Path) -> Path:
    return brats_folder / "BraTS2021_00001"


def test_good_subjects_have_no_problems(brats_folder):
    assert problems_in(brats_folder) == []
    raise_for_problems([])


def test_a_missing_modality_says_which_file_was_expected(brats_folder, folder):
    (folder / "BraTS2021_00001_t2.nii").unlink()
    problem = only_problem(brats_folder)
    assert problem.subject == "BraTS2021_00001"
    assert problem.file is None
    assert "modality t2 is missing" in problem.reason
    assert "BraTS2021_00001/BraTS2021_00001_t2.nii*" in problem.reason
    assert problems_in(brats_folder, modalities=("t1", "t1ce")) == []


def write_constant(path: Path, value: int) -> None:
    nib.save(nib.Nifti1Image(np.full((12, 12, 12), value, dtype=np.int16), np.eye(4)), path)


def write_affine(path: Path, change: float) -> None:
    affine = np.eye(4)
    affine[0, 3] = change
    volume = np.asarray(nib.load(path).dataobj).copy()
    nib.save(nib.Nifti1Image(volume, affine), path)


def test_rounding_of_an_affine_is_no_problem(brats_folder, folder):
    write_affine(folder / "BraTS2021_00001_t1ce.nii", 1e-5)
    assert problems_in(brats_folder) == []


def test_a_channel_that_a_4d_file_lacks_is_found(tmp_path, write_volume):
    stack = np.random.default_rng(0).normal(size=(6, 6, 6, 3)).astype(np.float32)
    write_volume(tmp_path / "imagesTr/BRATS_001.nii.gz", stack)
    write_volume(tmp_path / "labelsTr/BRATS_001.nii.gz", np.zeros((6, 6, 6), dtype=np.uint8))
    assert "expected four axes with a channel 3" in only_problem(tmp_path).reason


def test_problems_of_all_subjects_are_reported_together(brats_folder):
    names = [f"BraTS2021_{number:05d}" for number in range(3)]
    write_constant(brats_folder / names[0] / f"{names[0]}_t1.nii", 0)
    write_constant(brats_folder / names[0] / f"{names[0]}_seg.nii", 7)
    (brats_folder / names[2] / f"{names[2]}_t2.nii").unlink()
    problems = problems_in(brats_folder)
    assert [problem.subject for problem in problems] == [names[0], names[0], names[2]]
    with pytest.raises(UserError) as caught:
        raise_for_problems(problems)
    message = str(caught.value)
    assert message.startswith("Problems: 3, in 2 of the subjects")
    for text in (f"{names[0]}_t1.nii", f"{names[0]}_seg.nii", "t2", "empty", "unknown label 7"):
        assert text in message


def test_the_result_does_not_depend_on_the_number_of_workers(brats_folder, folder):
    write_constant(folder / "BraTS2021_00001_t1.nii", 0)
    description, subjects = find_subjects(brats_folder)
    subjects = [replace(subject, name=f"{i}") for i in range(9) for subject in subjects]
    one, many = (check_subjects(description, subjects, workers=n, progress=False) for n in (1, 5))
    assert one == many
    assert len(one) > 9
