"""What real data sets hold that phantoms do not, each found on one that somebody used."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from written import MODALITIES, touch, write_volume

import check_data
from kdnet.config import Config, DataConfig, TrainingConfig, parse_config
from kdnet.data.checks import check_subjects
from kdnet.data.description import load_description
from kdnet.data.loading import build_loader, prepare
from kdnet.data.preprocessing import Preprocessing, read_classes
from kdnet.data.splits import seen_before, share_labels
from kdnet.data.subjects import (
    ImageFile,
    Subject,
    check_patients,
    find_subjects,
    patient_of,
)
from kdnet.data.volumes import Geometry
from kdnet.errors import UserError
from kdnet.evaluation.inference import write_label_map
from kdnet.runs.plan import deal, folds_content, load_folds
from kdnet.runs.subjects import find_data

BRATS = load_description(Path("brats2021"))
THIRDS = Config(data=DataConfig(folds=3, validation_fraction=0.3), training=TrainingConfig(seed=1))


def visits(form="BraTS-GLI-{:05d}-{:03d}", patients=15):
    """Subjects of patients of whom every other one came twice."""
    names = [form.format(p, v) for p in range(patients) for v in range(1 + p % 2)]
    return [Subject(name, {}, patient=patient_of(name)) for name in names]


def patients(names):
    return {patient_of(name) for name in names}


@pytest.mark.parametrize("form", ["BraTS-GLI-{:05d}-{:03d}", "sub-{}_ses-{}", "TCGA_CS_{:04d}_{}"])
def test_visits_of_a_patient_stay_in_one_part(form):
    subjects = visits(form)
    tested = []
    for fold in deal(subjects, THIRDS):
        split = fold.split
        parts = [patients(part) for part in (split.train, split.validation, split.test)]
        assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]
        tested += split.test
        shared = share_labels(split, labelled=5, unlabelled=None)
        assert len(shared.train) in {4, 5}
        assert not patients(shared.train) & patients(shared.unlabelled)
        without = {"labelled": 6, "unlabelled": None}
        one, other = (share_labels(split, **without, leave_out=(n, 2)) for n in (0, 1))
        assert not patients(one.train) & patients(other.train)
    assert sorted(tested) == sorted(subject.name for subject in subjects)


def test_files_of_case_lists_keep_a_patient_in_one_part(tmp_path):
    subjects = visits()
    folds = deal(subjects, THIRDS)
    (tmp_path / "folds.json").write_text(json.dumps(folds_content(folds)))
    assert load_folds(tmp_path / "folds.json", subjects) == folds
    twice = [subject.name for subject in subjects if patient_of(subject.name).endswith("1")]
    parts = {"train": "00000", "validation": "00002", "test": "00004"}
    for two in itertools.combinations(parts, 2):
        lists = {part: [f"BraTS-GLI-{number}-000"] for part, number in parts.items()}
        lists |= zip(two, (twice[:1], twice[1:2]), strict=True)
        (tmp_path / "mine.json").write_text(json.dumps({"folds": [lists]}))
        with pytest.raises(UserError, match=r"BraTS-GLI-00001.*`patient`"):
            load_folds(tmp_path / "mine.json", subjects)


def test_another_visit_of_a_test_patient_neither_teaches_nor_is_taught_without_labels(tmp_path):
    description = load_description(Path("brats2023"))
    seen = ["BraTS-GLI-00004-000"]
    assert seen_before(["BraTS-GLI-00004-101", "x"], seen, description) == ["BraTS-GLI-00004-101"]
    for root, name in (("mine", "BraTS-GLI-00001-000"), ("more", "BraTS-GLI-00001-007")):
        touch(tmp_path / root, *(f"{name}/{name}-{m}.nii" for m in ("t1c", "t1n", "t2w", "t2f")))
    roots = ["--data-root", str(tmp_path / "mine"), "--unlabelled-root", str(tmp_path / "more")]
    with pytest.raises(UserError, match="BraTS-GLI-00001-007"):
        find_data(parse_config(roots), Console(quiet=True))


def test_a_description_says_whose_visits_subjects_are(tmp_path):
    touch(tmp_path, "anna_v_1/t1.nii", "anna_v_2/t1.nii", "ben/t1.nii", ".trash/t1.nii")
    mine = replace(BRATS, modalities={"t1": "{subject}/t1.nii"}, patient="{patient}_v_*")
    assert [s.patient for s in find_subjects(tmp_path, mine)[1]] == ["anna", "anna", "ben"]
    touch(tmp_path / "folders", "anna_b/v1/t1.nii", "anna_b/v2/t1.nii")
    mine = replace(BRATS, modalities={"t1": "{subject}/{session}/t1.nii"})
    subjects = find_subjects(tmp_path / "folders", mine)[1]
    found = [(s.name, s.patient) for s in subjects]
    assert found == [("anna_b_v1", "anna_b"), ("anna_b_v2", "anna_b")]
    for wrong in ("no placeholder", "../{patient}", "{patient}" + "*?" * 9):
        with pytest.raises(UserError, match="patient"):
            replace(BRATS, patient=wrong)


def test_a_patients_visits_stay_together_whatever_their_folders_are_called(tmp_path):
    dates = ("2020_01_05", "2020_06_07", "v1")
    touch(tmp_path / "mine", *(f"P_{p}/{date}/t1.nii" for p in range(6) for date in dates))
    touch(tmp_path / "more", "P_0/2022_02_02/t1.nii")
    mine = replace(BRATS, modalities={"t1": "{subject}/{session}/t1.nii | {subject}/t1.nii"})
    subjects = find_subjects(tmp_path / "mine", mine)[1]
    assert {s.patient for s in subjects} == {f"P_{p}" for p in range(6)}
    for fold in deal(subjects, THIRDS):
        assert not fold.split.torn()
        assert len(fold.split.test) == 6
    (other,) = find_subjects(tmp_path / "more", mine)[1]
    names = [s.name for s in subjects]
    assert seen_before([other.name], names, mine) == [other.name]
    assert not seen_before([other.name], [n for n in names if not n.startswith("P_0")], mine)
    # Who came once, and lies in no folder of a visit, is not cut at an underscore.
    touch(tmp_path / "once", "P_0/t1.nii", "P_1/t1.nii")
    assert [s.patient for s in find_subjects(tmp_path / "once", mine)[1]] == ["P_0", "P_1"]


def test_a_pattern_of_patients_that_fits_nobody_is_refused_and_who_does_not_fit_is_told(tmp_path):
    mine = replace(BRATS, patient="{patient}_v*")
    names = ("P0_v0", "P0_v1", "P1-v0")
    assert check_patients([Subject("P0_v0", {})], mine) == ""
    assert check_patients([Subject(name, {}) for name in names], BRATS) == ""
    told = check_patients([Subject(name, {}) for name in names], mine)
    assert "2 of 3" in told
    assert "P1-v0" in told
    with pytest.raises(UserError, match="P1-v0"):
        check_patients([Subject("P1-v0", {})], mine)
    touch(tmp_path / "data", *(f"P1-v0/P1-v0_{m}.nii" for m in BRATS.modalities))
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(mine.to_dict()))
    options = [
        *("--data-root", str(tmp_path / "data")),
        "--description",
        str(tmp_path / "mine.yaml"),
    ]
    assert check_data.main(options) == 2
    with pytest.raises(UserError, match="P1-v0"):
        find_data(parse_config(options), Console(quiet=True))


def brain(path, *, background=0.0, seed=0, share=0.2, modalities=MODALITIES):
    """A subject whose brain fills some of each image, above a background."""
    rng = np.random.default_rng([seed, 7])
    for modality in modalities:
        image = np.full((20, 20, 20), background, dtype=np.float32)
        image[-round(20 * share) :] = rng.uniform(100, 900, size=(round(20 * share), 20, 20))
        write_volume(path / f"{path.name}_{modality}.nii", image)
    write_volume(path / f"{path.name}_seg.nii", (image > 500).astype(np.uint8))


def warnings_of(root, **settings):
    description, subjects = find_subjects(root, BRATS)
    found = check_subjects(description, subjects, workers=1, progress=False, **settings)
    assert all(problem.warning for problem in found)
    return {problem.file.name: problem.reason for problem in found}


@pytest.mark.parametrize("background", [1e-5, -1e-5, -1024.0])
def test_a_background_that_is_not_zero_is_told_even_of_every_image(tmp_path, background):
    for number in range(3):
        brain(tmp_path / f"s{number}", background=background, seed=number)
    found = warnings_of(tmp_path)
    assert len(found) == 12
    assert all(f"{background:.3g}" in reason for reason in found.values())
    # The description can say so, and then nothing is to be told.
    noisy = replace(BRATS, background="noise")
    _, subjects = find_subjects(tmp_path, noisy)
    assert check_subjects(noisy, subjects, workers=1, progress=False) == []


def test_a_share_of_brain_unlike_the_others_is_told(tmp_path, capsys):
    for number in range(4):
        brain(tmp_path / f"s{number}", seed=number, share=0.25 if number % 2 else 0.15)
    assert warnings_of(tmp_path) == {}
    brain(tmp_path / "skull", seed=5, share=0.9)
    brain(tmp_path / "s1", seed=6, share=0.9, modalities=("t2",))
    # As much as in others, but three times as much as in the other images of the subject.
    brain(tmp_path / "small", seed=7, share=0.1)
    brain(tmp_path / "small", seed=8, share=0.3, modalities=("t2",))
    names = {*(f"skull_{name}.nii" for name in MODALITIES), "s1_t2.nii", "small_t2.nii"}
    assert {*warnings_of(tmp_path)} == names
    assert {*warnings_of(tmp_path, typical={"t1": 0.05})} > names
    assert check_data.main(["--data-root", str(tmp_path), "--json", "-"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {Path(row["file"]).name for row in told["problems"]} == names
    assert told["usable"] == 6


@pytest.mark.parametrize("factor", [0.99999994, 1.0002])
def test_labels_that_are_almost_whole_are_whole(tmp_path, factor):
    stored = np.array([0, 1, 4], dtype=np.float32).reshape(3, 1, 1) * factor
    path = write_volume(tmp_path / "seg.nii", stored)
    assert read_classes(ImageFile(path), BRATS).ravel().tolist() == [0, 1, 3]


@pytest.mark.parametrize("value", [-3, 255, 300, 40000, 2**31 - 1])
def test_labels_of_any_size_are_read_and_written_again(tmp_path, value):
    mine = replace(BRATS, labels={0: 0, 1: 1, 2: 2, value: 3})
    classes = np.array([0, 3, 1, 2], dtype=np.uint8).reshape(4, 1, 1)
    geometry = Geometry(classes.shape, np.eye(4), nib.Nifti1Header(), (1.0, 1.0, 1.0))
    path = tmp_path / "seg.nii.gz"
    write_label_map(path, classes, geometry, mine)
    assert np.asarray(nib.load(path).dataobj).ravel().tolist() == [0, value, 1, 2]
    np.testing.assert_array_equal(read_classes(ImageFile(path), mine), classes)
    with pytest.raises(UserError, match="2147483648"):
        replace(BRATS, labels={0: 0, 1: 1, 2: 2, 2**31: 3})


def test_a_pattern_that_is_too_wide_is_called_so(tmp_path):
    both = {"t1": "{subject}/*T1w.nii", "t1ce": "{subject}/*ce-gd_T1w.nii"}
    wide = replace(BRATS, modalities=both, segmentation="{subject}/seg.nii")
    for names in (["x_T1w", "x_ce-gd_T1w"], ["x_ce-gd_T1w"]):
        root = tmp_path / str(len(names))
        for name in (*names, "seg"):
            volume = np.zeros((4, 4, 4), dtype=np.uint8)
            volume[2, 2, 1:] = (1, 2, len(name) % 5 % 3)
            write_volume(root / f"x/{name}.nii", volume)
        _, subjects = find_subjects(root, wide)
        (problem,) = check_subjects(wide, subjects, workers=1, progress=False)
        assert "'{subject}/*T1w.nii', is too wide: it also fits x_ce-gd_T1w.nii" in problem.reason


def test_bids_is_found_with_sessions_and_without(tmp_path):
    anat = [f"sub-0{p}/ses-{s}/anat/sub-0{p}_ses-{s}" for p in (1, 2) for s in (1, 2)]
    for stem in (*anat, "sub-03/anat/sub-03"):
        touch(tmp_path, *(f"{stem}_{n}.nii.gz" for n in ("T1w", "ce-gd_T1w", "T2w", "FLAIR")))
        touch(tmp_path, f"derivatives/masks/{stem}_desc-tumour_dseg.nii.gz")
    description, subjects = find_subjects(tmp_path)
    assert description.name == "BIDS"
    assert [s.name for s in subjects][1:4:2] == ["sub-01_ses-2", "sub-02_ses-2"]
    assert [s.patient for s in subjects] == ["sub-01"] * 2 + ["sub-02"] * 2 + ["sub-03"]
    assert all(len(s.images) == 4 and s.segmentation and not s.rivals for s in subjects)
    assert len(subjects) == 5


def test_raw_files_of_nnunet_are_not_taken_for_the_decathlon(tmp_path):
    touch(
        tmp_path, *(f"imagesTr/case_1_{n:04d}.nii.gz" for n in range(4)), "labelsTr/case_1.nii.gz"
    )
    with pytest.raises(UserError, match=r"case_1_000.*channel_names.*--description nnunet"):
        find_subjects(tmp_path)
    _, (subject,) = find_subjects(tmp_path, load_description(Path("nnunet")))
    assert subject.name == "case_1"
    assert subject.images["t1ce"].path.name == "case_1_0001.nii.gz"
    assert subject.segmentation is not None


# Real data, where it is at hand: see `real_data` in conftest.py.


def test_twelve_brats_subjects_are_found_and_are_sound(real_data):
    description, subjects = find_subjects(real_data("brats2021"))
    assert description.name == "BraTS 2020/2021"
    assert len(subjects) == 12
    assert check_subjects(description, subjects[:2], workers=2, progress=False) == []


@pytest.fixture
def lgg(real_data):
    return find_subjects(real_data("lgg"), load_description("lgg"))


def test_lgg_is_read_by_its_description_alone(lgg, tmp_path):
    description, subjects = lgg
    assert len(subjects) == 70
    assert description.spacing == "nominal"
    assert list(description.modalities) == ["t1", "t1ce", "flair"]
    some = subjects[:4]
    assert check_subjects(description, some, workers=2, progress=False) == []
    # Some of these images have a background of 1 or 76.
    assert description.background == "noise"
    view = tuple(description.modalities)
    preprocessing = Preprocessing(description, view, description.crop, description.grid)
    dataset = prepare(some, preprocessing, tmp_path, 2, progress=False)
    loader = build_loader(dataset, 2, shuffle=False, seed=0, flips=False, workers=0)
    batch = next(iter(loader))
    assert batch["image"].shape == (2, 3, 64, 64, 32)
    assert torch.isfinite(batch["image"]).all()
    assert batch["label"].unique().tolist() == [0, 1]
