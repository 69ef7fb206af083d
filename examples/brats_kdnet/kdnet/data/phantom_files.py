"""Phantoms as files, in the layout of BraTS 2021, so that the same reader is used."""

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from kdnet.data.loading import map_parallel
from kdnet.data.phantom_images import make_phantom
from kdnet.data.subjects import PHANTOM_MARKER
from kdnet.errors import UserError
from kdnet.files import atomic_folder, read_mapping, remove_abandoned, write_json

#: Written into the marker: raise it whenever the same seed begins to give other images.
_VERSION = 1

_SMALLEST = 16


def generate_phantoms(
    root: Path,
    *,
    subjects: int,
    seed: int,
    size: int = 64,
    progress: bool = True,
) -> Path:
    """Write synthetic subjects, or the part of them that is not there yet."""
    if subjects < 1 or size < _SMALLEST:
        raise UserError(
            f"phantoms: expected at least 1 subject of at least {_SMALLEST} voxels along each "
            f"axis, found {subjects} of {size}."
        )
    root = Path(root)
    remove_abandoned(root)
    _claim(root, {"phantom": True, "version": _VERSION, "seed": seed, "size": size})
    names = phantom_names(subjects)
    # They would be found with the others, and make another data set.
    surplus = sorted({path.name for path in root.glob("Phantom_*")} - set(names))
    if surplus:
        raise UserError(
            f"{root}: expected {subjects} phantoms at most, found also {', '.join(surplus[:3])}. "
            "Give another folder, or ask for at least as many."
        )
    map_parallel(
        functools.partial(_write_subject, root, seed=seed, size=size),
        [index for index, name in enumerate(names) if not (root / name).is_dir()],
        workers=os.cpu_count() or 1,
        title="Making phantoms",
        progress=progress,
    )
    return root


def phantom_names(subjects: int) -> list[str]:
    """Name phantoms before there are any."""
    return [f"Phantom_{number:04d}" for number in range(1, subjects + 1)]


def _claim(root: Path, settings: Mapping[str, Any]) -> None:
    """Mark a new folder as made of phantoms; refuse one that holds anything else."""
    marker = root / PHANTOM_MARKER
    if marker.exists():
        found = read_mapping(marker)
        if found != settings:
            raise UserError(
                f"{root}: holds phantoms with the settings {found}, expected {dict(settings)}. "
                "Give another folder, or delete this one."
            )
    # Marked as phantoms, results on patients would be shown as worthless.
    elif root.exists() and (not root.is_dir() or any(root.glob("[!.]*"))):
        raise UserError(
            f"{root}: expected a new or empty folder for phantoms, found other files, which "
            "would be mistaken for phantoms. Give another folder."
        )
    else:
        root.mkdir(parents=True, exist_ok=True)
        write_json(marker, settings)


def _write_subject(root: Path, index: int, *, seed: int, size: int) -> None:
    """Write one subject; its folder appears when it is complete."""
    (*_, name) = phantom_names(index + 1)
    phantom = make_phantom(seed, index, size)
    with atomic_folder(root / name) as partial:
        for modality, image in phantom.images.items():
            _write(partial / f"{name}_{modality}.nii.gz", image)
        _write(partial / f"{name}_seg.nii.gz", phantom.segmentation)


def _write(path: Path, volume: NDArray[Any]) -> None:
    # Axes run to the left and to the back, as in BraTS.
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    affine[1, 3] = volume.shape[1] - 1
    image = nib.Nifti1Image(volume, affine)  # type: ignore[no-untyped-call]
    image.header["descrip"] = b"phantom"
    image.header.set_xyzt_units("mm")  # type: ignore[no-untyped-call]
    nib.save(image, path)
