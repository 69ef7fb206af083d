"""Small data sets on disk, in the layouts that the application reads."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from written import write_subject

from phantoms import generate_phantoms


@pytest.fixture
def brats_folder(tmp_path: Path) -> Path:
    """Three subjects of 12^3 voxels in the layout of BraTS 2021."""
    root = tmp_path / "brats"
    for number in range(3):
        write_subject(root / f"BraTS2021_{number:05d}")
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
