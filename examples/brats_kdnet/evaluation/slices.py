"""The slices that a report shows, kept in the run folder so that the report needs no images."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nibabel import orientations as nibabel_orientations
from numpy.typing import NDArray

from data.description import Description
from data.layouts import ImageFile, Subject
from data.preprocessing import read_classes
from data.volumes import read_geometry, read_volume
from evaluation.scoring import Score
from evaluation.tables import ROLES, format_number
from run_folder import atomic

# Rows run from the front of the head to its back, columns from the patient's right to the left,
# as radiologists look at it.
_RADIOLOGICAL = ("L", "P", "S")
_MARGIN = 4

orientations: Any = nibabel_orientations  # not typed


@dataclass(frozen=True)
class ShownCase:
    """One axial slice of one case, ready to be drawn.

    Attributes:
        name: Name of the subject.
        why: Why this case is shown, in words.
        position: Index of the slice from below, and the number of slices.
        aspect: Height of a pixel divided by its width.
        images: Modality name to grey values, (rows, columns) uint8.
        labels: "reference" or a role to class indices, the same shape.
    """

    name: str
    why: str
    position: tuple[int, int]
    aspect: float
    images: dict[str, NDArray[np.uint8]]
    labels: dict[str, NDArray[np.uint8]]


def choose_cases(scores: Sequence[Score]) -> dict[str, str]:
    """Choose cases by a rule, so that nobody can pick the prettiest.

    Args:
        scores: Of all networks.

    Returns:
        Case name to the reason: the largest loss, the median and the largest gain of the student
        over the baseline in native Dice, averaged over regions. Without both networks, the worst,
        median and best case of the network there is.
    """
    native = [score for score in scores if score.space == "native"]
    values = {role: _mean_dice(native, role) for role in ("student", "baseline", "teacher")}
    student, baseline = values["student"], values["baseline"]
    shared = {case: student[case] - baseline[case] for case in student if case in baseline}
    if shared:
        return _spread(shared, "{} difference between student and baseline")
    role = next((role for role, found in values.items() if found), None)
    return _spread(values[role], f"{{}} Dice of the {role}") if role else {}


def save_slices(
    path: Path,
    subjects: Mapping[str, Subject],
    description: Description,
    predictions: Path,
    scores: Sequence[Score],
) -> None:
    """Cut the slices of the chosen cases and keep them as one compressed file.

    Args:
        path: Where to write, ending in `.npz`.
        subjects: Held-out subjects by name.
        description: Label map and modalities.
        predictions: Folder with one folder of label maps per role.
        scores: Decide which cases are shown.

    Raises:
        UserError: If a file cannot be read.
    """
    arrays: dict[str, NDArray[Any]] = {}
    cases: list[dict[str, Any]] = []
    for name, why in choose_cases(scores).items():
        shown = _cut(subjects[name], why, description, predictions)
        prefix = len(cases)
        arrays |= {f"{prefix}/image/{key}": value for key, value in shown.images.items()}
        arrays |= {f"{prefix}/label/{key}": value for key, value in shown.labels.items()}
        cases.append({"name": name, "why": why, "position": shown.position, "aspect": shown.aspect})
    arrays["cases"] = np.array(json.dumps(cases))
    arrays["classes"] = np.array(json.dumps(list(description.classes)))
    with atomic(path) as incomplete, incomplete.open("wb") as stream:
        np.savez_compressed(stream, allow_pickle=False, **arrays)


def load_slices(path: Path) -> tuple[tuple[str, ...], list[ShownCase]]:
    """Read what `save_slices` wrote.

    Args:
        path: The file.

    Returns:
        Class names in index order, and the cases; both empty if there is no file.
    """
    if not path.is_file():
        return (), []
    with np.load(path, allow_pickle=False) as archive:
        arrays = dict(archive)
    shown = []
    for index, case in enumerate(json.loads(str(arrays["cases"]))):
        parts: dict[str, dict[str, Any]] = {"image": {}, "label": {}}
        for key, value in arrays.items():
            number, _, rest = key.partition("/")
            if number == str(index):
                kind, _, name = rest.partition("/")
                parts[kind][name] = value
        position = (int(case["position"][0]), int(case["position"][1]))
        shown.append(
            ShownCase(
                name=case["name"],
                why=case["why"],
                position=position,
                aspect=float(case["aspect"]),
                images=parts["image"],
                labels=parts["label"],
            )
        )
    return tuple(json.loads(str(arrays["classes"]))), shown


def _mean_dice(scores: Sequence[Score], role: str) -> dict[str, float]:
    cases: dict[str, list[float]] = {}
    for score in scores:
        if score.role == role:
            cases.setdefault(score.case, []).append(score.dice)
    return {case: statistics.fmean(values) for case, values in cases.items()}


def _spread(values: Mapping[str, float], wording: str) -> dict[str, str]:
    order = sorted(values, key=lambda case: (values[case], case))
    picked = {"lowest": order[0], "median": order[(len(order) - 1) // 2], "highest": order[-1]}
    chosen: dict[str, str] = {}
    for rank, case in picked.items():
        value = format_number(values[case], signed=True)
        chosen.setdefault(case, f"{wording.format(rank)} ({value})")
    return chosen


def _cut(subject: Subject, why: str, description: Description, predictions: Path) -> ShownCase:
    """The axial slice with the largest reference, cropped to the head."""
    first = next(iter(subject.images.values()))
    geometry = read_geometry(first)
    turn = _Turn(geometry.affine)
    volumes = {name: turn(_grey(file)) for name, file in subject.images.items()}
    labels = {
        name: turn(read_classes(file, description))
        for name, file in _label_files(subject, predictions).items()
    }
    depth = _fullest(list(labels.values()), next(iter(volumes.values())).shape[2])
    window = _head(list(volumes.values()), depth)
    spacing = turn.spacing(geometry.spacing)
    return ShownCase(
        name=subject.name,
        why=why,
        position=(depth + 1, next(iter(volumes.values())).shape[2]),
        aspect=spacing[1] / spacing[0],
        images={name: volume[..., depth].T[window] for name, volume in volumes.items()},
        labels={name: volume[..., depth].T[window] for name, volume in labels.items()},
    )


def _label_files(subject: Subject, predictions: Path) -> dict[str, ImageFile]:
    files = {} if subject.segmentation is None else {"reference": subject.segmentation}
    for role in ROLES:
        path = predictions / role / f"{subject.name}_seg.nii.gz"
        if path.is_file():
            files[role] = ImageFile(path)
    return files


class _Turn:
    """Turns volumes so that their axes run left, back, up."""

    def __init__(self, affine: NDArray[np.float64]) -> None:
        start = orientations.io_orientation(affine)
        end = orientations.axcodes2ornt(_RADIOLOGICAL)
        self._change = orientations.ornt_transform(start, end)

    def __call__(self, volume: NDArray[Any]) -> NDArray[Any]:
        turned: NDArray[Any] = orientations.apply_orientation(volume, self._change)
        return turned

    def spacing(self, spacing: Sequence[float]) -> list[float]:
        """Voxel size along the new axes."""
        size = [0.0, 0.0, 0.0]
        for axis, (target, _) in enumerate(self._change):
            size[int(target)] = spacing[axis]
        return size


def _grey(file: ImageFile) -> NDArray[np.uint8]:
    """Grey values between the 1st and 99.5th percentile of the non-zero voxels."""
    volume = read_volume(file).astype(np.float32)
    inside = volume[volume != 0]
    if inside.size == 0:
        return np.zeros(volume.shape, dtype=np.uint8)
    low, high = np.percentile(inside, [1, 99.5])
    scaled = (volume - low) / max(float(high - low), 1e-6)
    grey: NDArray[np.uint8] = (np.where(volume != 0, scaled.clip(0, 1), 0) * 255).astype(np.uint8)
    return grey


def _fullest(labels: Sequence[NDArray[np.uint8]], depth: int) -> int:
    """Slice with most labelled voxels of the reference, else of a prediction, else the middle."""
    for volume in labels:
        if volume.any():
            return int((volume > 0).sum(axis=(0, 1)).argmax())
    return depth // 2


def _head(volumes: Sequence[NDArray[np.uint8]], depth: int) -> tuple[slice, slice]:
    """Rows and columns that hold anything in any modality, with a margin."""
    filled = np.any([volume[..., depth].T > 0 for volume in volumes], axis=0)
    if not filled.any():
        return slice(None), slice(None)
    bounds = []
    for axis in (1, 0):
        places = np.flatnonzero(filled.any(axis=axis))
        bounds.append(slice(max(int(places[0]) - _MARGIN, 0), int(places[-1]) + 1 + _MARGIN))
    return bounds[0], bounds[1]
