"""Label maps on disk: the values of the data set's release on the grid of the original image."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from kdnet.files import atomic

NIFTI_SUFFIXES = (".nii.gz", ".nii")


def stem_of(path: Path) -> str:
    """File name without `.nii` or `.nii.gz`.

    >>> stem_of(Path("BraTS2021_00006_t1ce.nii.gz"))
    'BraTS2021_00006_t1ce'
    """
    for suffix in NIFTI_SUFFIXES:
        if path.name.endswith(suffix):
            return path.name.removesuffix(suffix)
    return path.name


def write_label_map(
    path: Path,
    classes: NDArray[np.integer],
    *,
    affine: NDArray[np.float64],
    header: nib.Nifti1Header,
    export_labels: Mapping[int, int],
    note: str = "",
) -> None:
    """Write class indices as a NIfTI label map that lies on the original image."""
    dtype = np.uint8 if max(export_labels.values()) < 256 else np.int16
    table = np.zeros(max(export_labels) + 1, dtype=dtype)
    for index, value in export_labels.items():
        table[index] = value
    new_image: Any = nib.Nifti1Image  # nibabel is not typed
    image = new_image(table[classes], affine, header)
    image.set_data_dtype(dtype)
    # The header may carry the display window of the intensities.
    image.header["cal_max"] = image.header["cal_min"] = 0
    image.header["descrip"] = note.encode("ascii", "replace")[:79]
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as partial:
        nib.save(image, partial)
