"""Small data sets on disk, in the layouts that the application reads."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from phantoms import generate_phantoms

MODALITIES = ("flair", "t1", "t1ce", "t2")


@pytest.fixture
def write_volume() -> Callable[..., Path]:
    """Writes an array as NIfTI and makes the folders above it."""

    def write(path: Path, volume: np.ndarray, affine: np.ndarray | None = None) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(volume, np.eye(4) if affine is None else affine), path)
        return path

    return write


@pytest.fixture
def write_subject(write_volume: Callable[..., Path]) -> Callable[..., None]:
    """Writes one subject in the layout of BraTS 2021; labels 1, 2 and 4 in nested cubes."""

    def write(
        root: Path, name: str, *, size: int = 12, seed: int = 0, suffix: str = ".nii"
    ) -> None:
        rng = np.random.default_rng(seed)
        for modality in MODALITIES:
            image = rng.integers(1, 1000, size=(size,) * 3).astype(np.int16)
            image[0] = 0
            write_volume(root / name / f"{name}_{modality}{suffix}", image)
        label = np.zeros((size,) * 3, dtype=np.uint8)
        label[2:10, 2:10, 2:10] = 2
        label[4:8, 4:8, 4:8] = 4
        label[5:7, 5:7, 5:7] = 1
        write_volume(root / name / f"{name}_seg{suffix}", label)

    return write


@pytest.fixture
def brats_folder(tmp_path: Path, write_subject: Callable[..., None]) -> Path:
    """Three subjects of 12^3 voxels in the layout of BraTS 2021."""
    root = tmp_path / "brats"
    for number in range(3):
        write_subject(root, f"BraTS2021_{number:05d}", seed=number)
    return root


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six phantoms of 16^3 voxels, for trainings that leave them as they are."""
    root = tmp_path_factory.mktemp("data") / "phantoms"
    return generate_phantoms(root, subjects=6, seed=0, size=16, progress=False)


@pytest.fixture
def real_data() -> Callable[[str], Path]:
    """The folder of a real data set; skips the test where there is none."""

    def find(name: str) -> Path:
        default = Path(__file__).parents[2].parent / "shared" / "data"
        folder = Path(os.environ.get("PRIVDISTILL_DATA", default)) / name
        if not folder.is_dir():
            pytest.skip(f"no real data at {folder}; set PRIVDISTILL_DATA")
        return folder

    return find
