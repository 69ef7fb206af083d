"""Phantoms: real files, the right contrasts, the same voxels every time."""

import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import phantoms
from kdnet.data import phantom_files
from kdnet.data.checks import check_subjects
from kdnet.data.phantom_files import generate_phantoms
from kdnet.data.phantom_images import ENHANCING, MODALITIES, NECROSIS, OEDEMA, make_phantom
from kdnet.data.subjects import find_subjects
from kdnet.errors import UserError

SIZE = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("phantoms") / "data"
    return generate_phantoms(root, subjects=10, seed=0, size=SIZE, progress=False)


def volumes(root: Path) -> dict[str, np.ndarray]:
    paths = sorted(root.glob("*/*.nii.gz"))
    return {path.name: np.asarray(nib.load(path).dataobj) for path in paths}


def mean(images: dict[str, np.ndarray], modality: str, mask: np.ndarray) -> float:
    return float(images[modality][mask].mean())


def test_the_reader_of_brats_reads_them_as_phantoms(folder):
    description, subjects = find_subjects(folder)
    assert description.phantom
    assert description.name == "phantom"
    assert [subject.name for subject in subjects[:2]] == ["Phantom_0001", "Phantom_0002"]
    assert check_subjects(description, subjects, workers=2, progress=False) == []
    labels = [volume for name, volume in volumes(folder).items() if "_seg" in name]
    assert all(label.any() for label in labels)
    # One in ten has no enhancing tumour.
    assert [(label == ENHANCING).any() for label in labels].count(False) == 1


def test_the_number_of_workers_and_subjects_does_not_matter(folder, tmp_path):
    alone, options = tmp_path / "alone", {"size": SIZE, "progress": False}
    generate_phantoms(alone, subjects=3, seed=0, **options)
    together = volumes(folder)
    for name, volume in volumes(alone).items():
        np.testing.assert_array_equal(volume, together[name])


def test_the_background_is_exactly_zero_and_the_brain_is_not(folder):
    for number in range(1, 11):
        stem = f"Phantom_{number:04d}/Phantom_{number:04d}"
        images = [np.asarray(nib.load(folder / f"{stem}_{m}.nii.gz").dataobj) for m in MODALITIES]
        masks = [image > 0 for image in images]
        assert all(np.array_equal(masks[0], mask) for mask in masks)
        assert 0.1 < masks[0].mean() < 0.6
        assert not masks[0][0].any()
        assert min(image.min() for image in images) == 0


@pytest.mark.parametrize("index", range(4))
def test_flair_shows_oedema_and_t1ce_the_rim_and_what_looks_like_it(index):
    phantom = make_phantom(3, index, 64)
    oedema, rim, middle = (phantom.segmentation == n for n in (OEDEMA, ENHANCING, NECROSIS))
    normal = (phantom.segmentation == 0) & (phantom.images["t1"] > 0)

    def ratio(modality, mask, other):
        return mean(phantom.images, modality, mask) / mean(phantom.images, modality, other)

    assert ratio("flair", oedema, normal) > 1.3
    assert ratio("t2", oedema, normal) > 1.05
    # Within a tenth or so of the white matter around it, so that T1ce alone hardly shows it.
    white = np.percentile(phantom.images["t1ce"][normal], 70)
    assert mean(phantom.images, "t1ce", oedema) / white == pytest.approx(1.0, abs=0.2)
    assert ratio("t1ce", rim, oedema) > 1.2
    assert middle.sum() <= 50 or ratio("t1ce", middle, oedema) < 1
    mimics = normal & (phantom.images["t1ce"] > 0.9 * mean(phantom.images, "t1ce", rim))
    assert mimics.sum() > 100
    assert ratio("flair", mimics, oedema) < 0.75


def test_finished_subjects_are_kept_and_missing_ones_made(tmp_path):
    root = generate_phantoms(tmp_path / "p", subjects=2, seed=0, size=16, progress=False)
    kept = root / "Phantom_0001" / "Phantom_0001_t1.nii.gz"
    before = kept.stat().st_mtime_ns
    partial = root / ".0123456789ab.partial.Phantom_0003"
    partial.mkdir()
    (partial / "rest").touch()
    os.utime(partial, (0, 0))
    generate_phantoms(root, subjects=3, seed=0, size=16, progress=False)
    assert kept.stat().st_mtime_ns == before
    assert len(list((root / "Phantom_0003").glob("*.nii.gz"))) == 5
    assert not partial.exists()


def test_a_failure_leaves_no_half_subject(tmp_path, monkeypatch):
    def full_disk(path, volume):
        if "t2" in path.name:
            raise OSError("no space left")
        path.touch()

    monkeypatch.setattr(phantom_files, "_write", full_disk)
    with pytest.raises(UserError, match="no space left"):
        generate_phantoms(tmp_path / "p", subjects=2, seed=0, size=16, progress=False)
    assert [path.name for path in (tmp_path / "p").iterdir()] == ["phantom.json"]


def test_a_folder_of_real_data_is_never_marked_as_phantoms(brats_folder):
    with pytest.raises(UserError, match="expected a new or empty folder"):
        generate_phantoms(brats_folder, subjects=1, seed=0, size=16, progress=False)
    assert not (brats_folder / "phantom.json").exists()


def test_the_command_line_writes_and_refuses(tmp_path, refusal):
    arguments = ["--out", str(tmp_path / "p"), "--subjects", "1", "--size", "16"]
    assert phantoms.main(arguments) == 0
    assert json.loads((tmp_path / "p" / "phantom.json").read_text())["phantom"] is True
    assert "holds phantoms with the settings" in refusal(phantoms, *arguments, "--seed", "5")
    phantoms.main(["--out", str(tmp_path / "p"), "--subjects", "2", "--size", "16"])
    assert "found also Phantom_0002" in refusal(phantoms, *arguments)
    assert refusal(phantoms, "--out", tmp_path / "q", "--size", "4")
    assert not (tmp_path / "q").exists()
