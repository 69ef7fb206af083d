"""Phantoms as a list of files, as MONAI's data sets read them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import scripts  # noqa: F401  # makes the application's modules known
from kdnet.data.phantom_files import generate_phantoms, phantom_names

MODALITIES = ("flair", "t1", "t1ce", "t2")


def files(
    root: str,
    *,
    subjects: int,
    size: int,
    seed: int = 0,
    modalities: Sequence[str] = MODALITIES,
) -> list[dict[str, Any]]:
    """Write phantoms, unless they are there, and list each subject's "image" files and "label"."""
    folder = generate_phantoms(Path(root), subjects=subjects, seed=seed, size=size, progress=False)
    return [
        {
            "image": [str(folder / name / f"{name}_{m}.nii.gz") for m in modalities],
            "label": str(folder / name / f"{name}_seg.nii.gz"),
        }
        for name in phantom_names(subjects)
    ]
