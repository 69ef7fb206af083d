"""Finding subjects: the releases of BraTS, the decathlon, a user's own folders."""

from dataclasses import replace
from pathlib import Path

import pytest
from written import touch

from kdnet.data.description import load_description
from kdnet.data.subjects import ImageFile, find_subjects
from kdnet.errors import UserError


def files(folder: str, subject: str, names: str, separator: str = "_", suffix: str = ".nii.gz"):
    return [f"{folder}{subject}/{subject}{separator}{name}{suffix}" for name in names.split()]


OLD = "flair t1 t1ce t2 seg"


@pytest.mark.parametrize(
    ("written", "release", "expected"),
    [
        (
            [*files("", "BraTS2021_2", OLD), *files("", "BraTS2021_1", OLD), "README.md"],
            "BraTS 2020/2021",
            [("BraTS2021_1", None, "_t1ce.nii.gz"), ("BraTS2021_2", None, "_t1ce.nii.gz")],
        ),
        (
            [*files("HGG/", "B", OLD), *files("LGG/", "A", OLD)],
            "BraTS 2018/2019",
            [("A", "LGG", "_t1ce.nii.gz"), ("B", "HGG", "_t1ce.nii.gz")],
        ),
        (
            files("", "BraTS-GLI-00000-000", "t2f t1n t1c t2w seg", "-", ".nii"),
            "BraTS 2023",
            [("BraTS-GLI-00000-000", None, "-t1c.nii")],
        ),
    ],
)
def test_a_release_is_recognised_and_its_subjects_sorted(tmp_path, written, release, expected):
    touch(tmp_path, *written)
    description, subjects = find_subjects(tmp_path)
    assert description.name == release
    found = [(s.name, s.grade, s.images["t1ce"].path.name) for s in subjects]
    assert found == [(name, grade, name + ending) for name, grade, ending in expected]
    assert all([*s.images] == ["flair", "t1", "t1ce", "t2"] for s in subjects)
    assert all("seg" in s.segmentation.path.name for s in subjects)


def test_decathlon_modalities_are_channels_of_one_file(tmp_path):
    touch(tmp_path, "imagesTr/BRATS_001.nii.gz", "labelsTr/BRATS_001.nii.gz")
    touch(tmp_path, "imagesTr/._BRATS_001.nii.gz")
    description, (subject,) = find_subjects(tmp_path)
    assert description.name == "MSD Task01"
    assert subject.images["t1ce"] == ImageFile(tmp_path / "imagesTr/BRATS_001.nii.gz", 2)
    assert subject.segmentation == ImageFile(tmp_path / "labelsTr/BRATS_001.nii.gz")


def test_the_misnamed_label_map_of_2020_is_found_where_there_is_no_other(tmp_path):
    name, misnamed = "BraTS20_Training_355", "W39_1998.09.19_Segm.nii"
    touch(tmp_path, *files("", name, "flair t1 t1ce t2", suffix=".nii"), f"{name}/{misnamed}")
    assert find_subjects(tmp_path)[1][0].segmentation.path.name == misnamed
    touch(tmp_path, f"{name}/{name}_seg.nii")
    _, (subject,) = find_subjects(tmp_path)
    assert subject.segmentation.path.name == f"{name}_seg.nii"
    assert subject.rivals == {}


def test_missing_files_leave_the_subject_in_the_list(tmp_path):
    touch(tmp_path, *files("", "A", "t1 t1ce"), *files("", "B", "t1_renamed"))
    _, subjects = find_subjects(tmp_path)
    assert [(s.name, list(s.images)) for s in subjects] == [("A", ["t1", "t1ce"]), ("B", [])]
    assert subjects[0].segmentation is None


def test_flat_files_without_folders_are_described_without_a_slash(tmp_path):
    touch(tmp_path, "p.1_t1.nii", "p.1_seg.nii", "p2_t1.nii.gz")
    own = {"modalities": {"t1": "{subject}_t1.nii*"}, "segmentation": "{subject}_seg.nii*"}
    _, subjects = find_subjects(tmp_path, replace(load_description("lgg"), **own))
    found = [(subject.name, subject.segmentation is not None) for subject in subjects]
    assert found == [("p.1", True), ("p2", False)]


def test_the_marker_of_phantoms_makes_any_description_a_phantom(tmp_path):
    touch(tmp_path, *files("", "Phantom_0001", OLD), "phantom.json")
    assert find_subjects(tmp_path)[0].phantom
    assert find_subjects(tmp_path, load_description(Path("brats2021")))[0].phantom


def test_nothing_found_lists_the_layouts_looked_for(tmp_path):
    touch(tmp_path, "holiday.jpg")
    with pytest.raises(UserError, match=r"nowhere: .*found nothing"):
        find_subjects(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"(?s)2020/2021.*2018/2019.*2023.*MSD Task01.*template"):
        find_subjects(tmp_path)


def test_a_folder_too_high_is_pointed_down(tmp_path):
    touch(tmp_path, *files("training/data/", "A", OLD))
    with pytest.raises(UserError, match=r"There are images in .*data: give that folder"):
        find_subjects(tmp_path / "training")
