"""Every broken subject is found and named in one pass; sound ones among them stay sound."""

import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from written import write_subject, write_volume

from faults.corpus import FAULTS, NAMES, SOUND, SOUND_NAMES, image, write_corpus
from kdnet.data.checks import check_subjects
from kdnet.data.description import load_description
from kdnet.data.subjects import find_subjects


def problems_of(root):
    description, subjects = find_subjects(root, load_description(Path("brats2021")))
    found = check_subjects(description, subjects, workers=2, progress=False)
    return {s.name: [p for p in found if p.subject == s.name] for s in subjects}


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    return problems_of(write_corpus(tmp_path_factory.mktemp("corpus") / "data"))


@pytest.mark.parametrize("name", FAULTS)
def test_a_broken_subject_is_named_with_file_and_reason(problems, name):
    _, words = FAULTS[name]
    (problem,) = [problem for problem in problems[name] if words in problem.reason]
    assert problem.file is None or problem.file.name.startswith((name, "scan-"))
    # One fault has one reason; only files that all lack are listed one by one.
    assert len(problems[name]) == 1 or name == "names_that_fit_no_pattern"


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_name_that_breaks_tables_or_files_is_told(problems, name):
    (problem,) = problems[name]
    assert NAMES[name] in problem.reason


@pytest.mark.parametrize("name", [*SOUND, *SOUND_NAMES, "good0", "good3"])
def test_a_sound_subject_stays_sound(problems, name):
    assert problems[name] == []


def test_the_result_does_not_depend_on_the_number_of_workers(tmp_path):
    FAULTS["constant"][0](write_subject(tmp_path / "constant"))
    description, (subject,) = find_subjects(tmp_path)
    many = [replace(subject, name=f"{number}") for number in range(9)]
    one, several = (check_subjects(description, many, workers=n, progress=False) for n in (1, 5))
    assert one == several
    assert len(one) >= 9


def test_a_channel_that_a_4d_file_lacks_is_told(tmp_path):
    stack = np.random.default_rng(0).normal(size=(6, 6, 6, 3)).astype(np.float32)
    for folder, volume in (("imagesTr", stack), ("labelsTr", np.zeros((6, 6, 6), np.uint8))):
        write_volume(tmp_path / folder / "BRATS_001.nii.gz", volume)
    (problem,) = check_subjects(*find_subjects(tmp_path), workers=1, progress=False)
    assert "expected four axes with a channel 3" in problem.reason


def test_one_subject_in_two_strata_is_told(tmp_path):
    for grade in ("HGG", "LGG"):
        write_subject(tmp_path / grade / "Twin")
    description, (subject,) = find_subjects(tmp_path, load_description(Path("brats2018")))
    found = check_subjects(description, [subject], workers=1, progress=False)
    assert len(found) == 5
    assert all("claims to be" in problem.reason for problem in found)


@pytest.fixture
def another_user():
    """Root may read everything, so for the length of a test it is somebody else."""
    root = Path(tempfile.mkdtemp())
    try:
        root.chmod(0o755)
        yield root
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        shutil.rmtree(root)


def test_what_may_not_be_read_is_told(another_user):
    write_subject(another_user / "good")
    for name in ("file", "folder"):
        write_subject(another_user / name)
    image(another_user / "file").chmod(0)
    (another_user / "folder").chmod(0)
    try:
        if os.getuid() == 0:
            os.seteuid(65534)
    except PermissionError:
        pytest.skip("this root may not become another user")
    found = problems_of(another_user)
    if os.getuid() == 0:
        os.seteuid(0)
    assert found["good"] == []
    assert "Permission denied" in found["file"][0].reason
    assert "Permission denied" in found["folder"][0].reason
