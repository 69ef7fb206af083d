"""Bring subjects in the BraTS layout into nnU-Net's raw format.

    python examples/nnunet/to_nnunet.py --source runs/phantoms \
        --out "$nnUNet_raw/Dataset900_Phantoms" --test 6

Channels are t1, t1ce, t2, flair; the one label is the whole tumour. The last subjects become test
cases with a reference in `labelsTs`.
"""

import argparse
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np

CHANNELS = ("t1", "t1ce", "t2", "flair")
LABELS = {"background": 0, "tumour": 1}


def convert(source: Path, out: Path, test: int) -> int:
    """Write a data set in nnU-Net's raw format; return its number of training cases."""
    subjects = sorted(
        path for path in source.iterdir() if (path / f"{path.name}_seg.nii.gz").exists()
    )
    if not 0 <= test < len(subjects):
        raise SystemExit(
            f"{source}: {len(subjects)} subjects, of which {test} cannot be for tests."
        )
    for position, subject in enumerate(subjects):
        part = "Ts" if position >= len(subjects) - test else "Tr"
        _write(subject, out / f"images{part}", out / f"labels{part}")
    description = {
        "channel_names": {str(index): name for index, name in enumerate(CHANNELS)},
        "labels": LABELS,
        "numTraining": len(subjects) - test,
        "file_ending": ".nii.gz",
    }
    (out / "dataset.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    return len(subjects) - test


def _write(subject: Path, images: Path, labels: Path) -> None:
    images.mkdir(parents=True, exist_ok=True)
    labels.mkdir(parents=True, exist_ok=True)
    name = subject.name
    for index, channel in enumerate(CHANNELS):
        shutil.copy(subject / f"{name}_{channel}.nii.gz", images / f"{name}_{index:04d}.nii.gz")
    reference = nib.load(subject / f"{name}_seg.nii.gz")
    values = (np.asarray(reference.dataobj) > 0).astype(np.uint8)
    nib.save(nib.Nifti1Image(values, reference.affine), labels / f"{name}.nii.gz")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write nnU-Net's raw format.")
    parser.add_argument("--source", type=Path, required=True, help="folder of subjects")
    parser.add_argument("--out", type=Path, required=True, help="DatasetNNN_Name to make")
    parser.add_argument("--test", type=int, default=6, help="subjects for tests (default 6)")
    options = parser.parse_args()
    print(convert(options.source, options.out, options.test), "training cases")
