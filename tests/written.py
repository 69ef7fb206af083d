"""Small subjects on disk, in the layout of BraTS 2021. No image of anybody is involved."""

import os
import zlib

import nibabel as nib
import numpy as np

MODALITIES = ("flair", "t1", "t1ce", "t2")
SIZE = 12


def touch(root, *names):
    """Empty files and the folders above them."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def write_volume(path, volume, affine=None):
    """An array as NIfTI, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(volume, np.eye(4) if affine is None else affine), path)
    return path


def write_subject(folder, *, size=SIZE, suffix=".nii"):
    """A sound subject, labels 1, 2 and 4 in nested cubes; its name decides about its voxels."""
    rng = np.random.default_rng(zlib.crc32(os.fsencode(folder.name)))
    for modality in MODALITIES:
        image = rng.integers(1, 1000, size=(size,) * 3).astype(np.int16)
        image[0] = 0
        write_volume(folder / f"{folder.name}_{modality}{suffix}", image)
    label = np.zeros((size,) * 3, dtype=np.uint8)
    label[2:10, 2:10, 2:10], label[4:8, 4:8, 4:8], label[5:7, 5:7, 5:7] = 2, 4, 1
    write_volume(folder / f"{folder.name}_seg{suffix}", label)
    return folder
