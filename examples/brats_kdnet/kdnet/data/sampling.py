"""What a training sample is: a whole subject, a patch of one, or a slice of one."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset

from kdnet.config import DataConfig
from kdnet.data.description import Size
from kdnet.data.loading import MappedSamples
from kdnet.data.patches import TUMOUR_EVERY, FixedPatches, FreePatches
from kdnet.data.preprocessing import Sample
from kdnet.data.slicing import AXES, SliceDataset

#: Patches of a validation subject whose loss is followed; one of them lies on tumour.
_VALIDATION_PATCHES = TUMOUR_EVERY


def readable(prepared: Any, data: DataConfig) -> Any:
    """Return preprocessed subjects so that parts of them are read without the rest."""
    whole = data.patch is None and data.slices is None
    return prepared if whole else MappedSamples(prepared)


def training_samples(subjects: Dataset[Sample], data: DataConfig, seed: int) -> Dataset[Sample]:
    """Return the samples that a network is trained on."""
    if data.patch is not None and data.patches_per_case:
        return FixedPatches(subjects, data.patch, data.patches_per_case, seed)
    if data.patch is not None:
        return FreePatches(subjects, data.patch)
    if data.slices is not None:
        return SliceDataset(subjects, data.slices, empty_slices=data.empty_slices)
    return subjects


def validation_samples(subjects: Dataset[Sample], data: DataConfig, seed: int) -> Dataset[Sample]:
    """Return the samples whose loss is followed; the same in every epoch."""
    if data.patch is not None:
        return FixedPatches(subjects, data.patch, _VALIDATION_PATCHES, seed)
    if data.slices is not None:
        return SliceDataset(subjects, data.slices)
    return subjects


def samples_per_subject(data: DataConfig, grid: Size | None) -> int:
    """Return about how many samples an epoch takes from a subject."""
    if data.slices is not None and grid is not None:
        return grid[AXES[data.slices]]
    return data.patches_per_case or 1


def moves(data: DataConfig) -> bool:
    """Say whether training samples lie elsewhere in every epoch, so that no key names them."""
    return data.patch is not None and not data.patches_per_case


def whole_volumes(subjects: Any, data: DataConfig) -> Any | None:
    """Return the subjects whose Dice is of whole volumes, put together from their parts."""
    return None if data.patch is None and data.slices is None else subjects


def cache_remark(data: DataConfig, place: str) -> str | None:
    """Say that the teacher cache, which was asked for, is off; None where that is not so."""
    if not moves(data) or place == "off":
        return None
    return (
        "Teacher cache: off, as patches at new positions in every epoch do not come back; "
        "--patches_per_case N gives each subject N positions to which they do."
    )


def plane_remark(data: DataConfig, orientation: str) -> str | None:
    """Say that slices are not those that their name means, if so."""
    if data.slices is None or _cuts_across(data.slices, orientation):
        return None
    return (
        f"--slices {data.slices} cuts across axis {AXES[data.slices] + 1} of volumes whose axes "
        f"are {orientation}: the slices are not {data.slices} ones. That is no error, but another "
        "plane or another orientation may be what you want."
    )


def _cuts_across(plane: str, orientation: str) -> bool:
    """Say whether a plane's axis runs as its name says."""
    across = {"sagittal": "LR", "coronal": "AP", "axial": "SI"}[plane]
    return orientation[AXES[plane]] in across
