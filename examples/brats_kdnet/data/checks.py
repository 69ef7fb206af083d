"""Looking at every file of a data set before training, and reporting all problems at once."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from data.description import Description
from data.layouts import ImageFile, Subject
from data.parallel import map_parallel
from data.preprocessing import UnknownLabelError, read_classes
from data.volumes import Geometry, UnreadableVolumeError, read_geometry, read_volume
from errors import UserError

#: Entries of two affines (mm per voxel, mm) may differ by what single precision loses.
_AFFINE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Problem:
    """Something that keeps a subject from being used.

    Attributes:
        subject: Name of the subject.
        file: The file at fault; None where a file is missing.
        reason: What was expected and found.
    """

    subject: str
    file: Path | None
    reason: str


def check_subjects(
    description: Description,
    subjects: Sequence[Subject],
    *,
    workers: int,
    progress: bool = True,
    need_segmentation: bool = True,
    modalities: Sequence[str] | None = None,
) -> list[Problem]:
    """Read every file once and collect whatever is wrong with any of them.

    Found are missing modalities and label maps, files that cannot be read to their end, volumes
    that are not 3-D, that are empty or not finite, shapes and affines that differ within a
    subject, and labels that the description does not name. Each worker holds one volume at a time.

    Args:
        description: What the subjects should look like.
        subjects: What to check.
        workers: Subjects checked at a time.
        progress: Whether to show a progress bar.
        need_segmentation: Whether a missing label map is a problem.
        modalities: Which modalities will be used; None: all of the description.

    Returns:
        The problems, in the order of the subjects; empty if all is well.
    """
    check = functools.partial(
        _check_subject,
        description=description,
        modalities=tuple(description.modalities if modalities is None else modalities),
        need_segmentation=need_segmentation,
    )
    found = map_parallel(
        check, subjects, workers=workers, title="Checking subjects", progress=progress
    )
    problems = [problem for problems in found for problem in problems]
    # Only readable headers can be compared, so this waits until all else is well.
    return problems or list(_turned(subjects, description, modalities))


def _turned(
    subjects: Sequence[Subject], description: Description, modalities: Sequence[str] | None
) -> Iterator[Problem]:
    """Subjects whose axes run otherwise than in most; a network would see them turned."""
    first = next(iter(modalities or description.modalities))
    files = {subject.name: subject.images[first] for subject in subjects}
    codes = {name: read_geometry(file).orientation for name, file in files.items()}
    usual = max(codes.values(), key=list(codes.values()).count, default="")
    for name, found in codes.items():
        if found != usual:
            reason = f"its axes run {found}, those of most subjects {usual}; reorient it first"
            yield Problem(name, files[name].path, reason)


def raise_for_problems(problems: Sequence[Problem]) -> None:
    """Stop if there are problems.

    Args:
        problems: What `check_subjects` gave.

    Raises:
        UserError: If there is any: a table with subject, file and reason of every one.
    """
    if not problems:
        return
    subjects = len({problem.subject for problem in problems})
    table = Table("subject", "file", "reason", title_justify="left")
    for problem in problems:
        file = "" if problem.file is None else problem.file.name
        table.add_row(problem.subject, file, problem.reason)
    text = io.StringIO()
    # A fixed width: the message may end up in a log file, where no terminal tells its own.
    Console(file=text, width=120, markup=False).print(table)
    folders = sorted({str(problem.file.parent) for problem in problems if problem.file is not None})
    where = f"Files lie in {', '.join(folders[:3])}{' ...' if len(folders) > 3 else ''}.\n"
    raise UserError(
        f"Problems: {len(problems)}, in {subjects} of the subjects; repair or remove them. Nothing "
        f"was written.\n{where if folders else ''}{text.getvalue().rstrip()}"
    )


def _check_subject(
    subject: Subject,
    *,
    description: Description,
    modalities: tuple[str, ...],
    need_segmentation: bool,
) -> list[Problem]:
    images = {name: subject.images[name] for name in modalities if name in subject.images}
    problems = list(_missing(subject, description, modalities, need_segmentation))
    files = list(images.values())
    if subject.segmentation is not None:
        files.append(subject.segmentation)
    geometries, broken = _headers(subject.name, files)
    problems += broken
    problems += _disagreements(subject.name, geometries)
    readable = [file for file, _ in geometries]
    for file in readable:
        reason = (
            _label_fault(file, description) if file is subject.segmentation else _image_fault(file)
        )
        if reason:
            problems.append(Problem(subject.name, file.path, reason))
    return problems


def _missing(
    subject: Subject, description: Description, modalities: Iterable[str], need_segmentation: bool
) -> Iterator[Problem]:
    for modality in modalities:
        if modality not in subject.images:
            pattern = _pattern(description.modalities[modality], subject)
            yield Problem(subject.name, None, f"modality {modality} is missing, expected {pattern}")
    if need_segmentation and subject.segmentation is None:
        pattern = _pattern(description.segmentation, subject)
        yield Problem(subject.name, None, f"the label map is missing, expected {pattern}")


def _pattern(pattern: str, subject: Subject) -> str:
    filled = pattern.replace("{subject}", subject.name)
    return re.sub(r"\{grade[^}]*\}", subject.grade or "*", filled)


def _headers(
    name: str, files: Iterable[ImageFile]
) -> tuple[list[tuple[ImageFile, Geometry]], list[Problem]]:
    """Headers of the files that have one, and a problem for each of the others."""
    geometries: list[tuple[ImageFile, Geometry]] = []
    problems: list[Problem] = []
    for file in files:
        try:
            geometries.append((file, read_geometry(file)))
        except UnreadableVolumeError as error:
            problems.append(Problem(name, file.path, error.reason))
    return geometries, problems


def _disagreements(name: str, geometries: list[tuple[ImageFile, Geometry]]) -> Iterator[Problem]:
    """Files of one subject that do not lie on the grid of its first file."""
    for file, geometry in geometries:
        first_file, first = geometries[0]
        if geometry.shape != first.shape:
            reason = f"shape {geometry.shape}, but {first_file.path.name} has {first.shape}"
            yield Problem(name, file.path, reason)
        elif not np.isfinite(geometry.affine).all():
            yield Problem(name, file.path, "the affine is not finite")
        elif not np.allclose(geometry.affine, first.affine, atol=_AFFINE_TOLERANCE):
            difference = np.abs(geometry.affine - first.affine).max()
            reason = f"affine differs from that of {first_file.path.name} by up to {difference:.3g}"
            yield Problem(name, file.path, reason)


def _image_fault(file: ImageFile) -> str | None:
    try:
        volume = read_volume(file)
    except UnreadableVolumeError as error:
        return error.reason
    return _value_fault(volume)


def _value_fault(volume: NDArray[Any]) -> str | None:
    if volume.dtype.kind == "f" and not np.isfinite(volume).all():
        return f"{int((~np.isfinite(volume)).sum())} voxels are not finite"
    low, high = volume.min(), volume.max()
    if low == high:
        return "the volume is empty, all zero" if low == 0 else f"every voxel is {low:g}"
    return None


def _label_fault(file: ImageFile, description: Description) -> str | None:
    try:
        read_classes(file, description)
    except (UnreadableVolumeError, UnknownLabelError) as error:
        return error.reason
    return None
