"""Looking at every file of a data set before training, and reporting all problems at once."""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import os
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kdnet.data.description import Description
from kdnet.data.loading import map_parallel
from kdnet.data.preprocessing import read_classes
from kdnet.data.subjects import ImageFile, Subject
from kdnet.data.volumes import Geometry, UnreadableVolumeError, read_geometry, read_volume
from kdnet.errors import UserError, printable

#: Entries of two affines (mm per voxel, mm) may differ by what single precision loses.
_AFFINE_TOLERANCE = 1e-3
#: Voxel sizes of images of patients, mm, with room to spare; and how far an affine may be off.
_VOXEL_SIZES = (0.01, 100.0)
_SPACING_TOLERANCE = 0.01
#: What a header may give distances in, by its code, other than millimetres (2) and nothing (0).
_UNITS = {1: "metres", 3: "micrometres"}
#: How far two transforms may place a corner of a volume apart, voxels.
_PLACES_TOLERANCE = 0.5
#: Squares of intensities must fit into single precision, as z-scores need them.
_LARGEST_VALUE = 1e15
#: How many times more or fewer non-zero voxels than usual, or larger voxels, are told.
_UNUSUAL_SHARE, _UNUSUAL_SIZE = 2.5, 1.5
#: Share of voxels next to the value of the corner that makes them background, and how near.
_BACKGROUND, _NEAR = 0.05, 1e-4
#: File systems allow 255 bytes; names of subjects get endings such as those of the cache.
_LONGEST_NAME = 180


@dataclass(frozen=True)
class Problem:
    """Something that keeps a subject from being used, or only looks wrong.

    Attributes:
        subject: Name of the subject.
        file: The file at fault; None where a file is missing.
        reason: What was expected and found.
        warning: Whether the subject can be used all the same.
    """

    subject: str
    file: Path | None
    reason: str
    warning: bool = False


@dataclass(frozen=True)
class _Findings:
    """What one subject's files say: problems, how axes run, and of images by modality a digest.

    So is the share of non-zero voxels.
    """

    problems: list[Problem]
    orientation: str | None = None
    digests: dict[str, bytes] = field(default_factory=dict)
    nonzero: dict[str, float] = field(default_factory=dict)


def check_subjects(
    description: Description,
    subjects: Sequence[Subject],
    *,
    workers: int,
    progress: bool = True,
    need_segmentation: bool = True,
    modalities: Sequence[str] | None = None,
    distinct: bool = True,
    typical: Mapping[str, float] | None = None,
) -> list[Problem]:
    """Read every file once and collect whatever is wrong with any of them."""
    used = tuple(description.modalities if modalities is None else modalities)
    check = functools.partial(
        _check_subject,
        description=description,
        modalities=used,
        need_segmentation=need_segmentation,
    )
    found = map_parallel(
        check, subjects, workers=workers, title="Checking subjects", progress=progress
    )
    turned = _turned(subjects, used, [own.orientation for own in found])
    copies = _copies(subjects, [own.digests if distinct else {} for own in found])
    unusual = outlying(subjects, [own.nonzero for own in found], typical or {})
    return [
        problem
        for own, *more in zip(found, turned, copies, unusual, strict=True)
        for problem in itertools.chain(own.problems, *more)
    ]


def outlying(
    subjects: Sequence[Subject],
    shares: Sequence[Mapping[str, float]],
    typical: Mapping[str, float],
) -> list[list[Problem]]:
    """Warn of images whose share of non-zero voxels, which are taken for brain, is not the usual.

    Usual is what the other subjects have in the modality, or what is said to be typical of it; and
    what the other modalities of the subject have.
    """
    medians = {
        name: statistics.median(own[name] for own in shares if name in own)
        for name in dict.fromkeys(itertools.chain(*shares))
    } | dict(typical)
    problems = []
    for subject, own in zip(subjects, shares, strict=True):
        within = statistics.median(own.values()) if own else 0.0
        found = [
            (name, share, usual, of_what)
            for name, share in own.items()
            for usual, of_what in ((medians[name], "most subjects"), (within, "its others"))
            if not 1 / _UNUSUAL_SHARE <= share / usual <= _UNUSUAL_SHARE
        ]
        problems.append(
            [
                Problem(
                    subject.name,
                    subject.images[name].path,
                    f"{share:.0%} of its voxels are not 0 and so taken for brain, in {of_what} "
                    f"{usual:.0%}; is the background 0, is the skull removed as in the others?",
                    warning=True,
                )
                for name, share, usual, of_what in {item[0]: item for item in found[::-1]}.values()
            ]
        )
    return problems


def unlike_training(
    subjects: Sequence[Subject], modalities: Sequence[str], spacing: Sequence[float]
) -> list[Problem]:
    """Warn of voxels whose size is far from what a network was trained on; it sees shapes."""
    problems = []
    for subject in subjects:
        file = next(subject.images[name] for name in modalities if name in subject.images)
        found = read_geometry(file).spacing
        ratios = [own / usual for own, usual in zip(found, spacing, strict=False) if usual > 0]
        if not all(1 / _UNUSUAL_SIZE <= ratio <= _UNUSUAL_SIZE for ratio in ratios):
            own, usual = (" x ".join(f"{n:.3g}" for n in size) for size in (found, spacing))
            reason = f"voxels measure {own} mm, in training {usual} mm; resample the image first"
            problems.append(Problem(subject.name, file.path, reason, warning=True))
    return problems


def _turned(
    subjects: Sequence[Subject], modalities: Sequence[str], orientations: Sequence[str | None]
) -> list[list[Problem]]:
    """Subjects whose axes run otherwise than in most; a network would see them turned."""
    known = [orientation for orientation in orientations if orientation is not None]
    usual = max(known, key=known.count, default="")
    problems: list[list[Problem]] = []
    for subject, found in zip(subjects, orientations, strict=True):
        reason = f"its axes run {found}, those of most subjects {usual}; reorient it first"
        files = [subject.images[name].path for name in modalities if name in subject.images]
        turned = found not in {None, usual}
        problems.append([Problem(subject.name, files[0], reason)] if turned else [])
    return problems


def _copies(
    subjects: Sequence[Subject], digests: Sequence[dict[str, bytes]]
) -> list[list[Problem]]:
    """Images with the voxels of an earlier one: a patient under two names, or a file misnamed."""
    first: dict[bytes, tuple[Subject, str]] = {}
    problems: list[list[Problem]] = []
    for subject, own in zip(subjects, digests, strict=True):
        of_others: dict[str, list[str]] = {}
        found: list[Problem] = []
        for modality, content in own.items():
            other, name = first.setdefault(content, (subject, modality))
            if other is not subject:
                of_others.setdefault(other.name, []).append(modality)
            elif name != modality and subject.images[name] != subject.images[modality]:
                reason = f"it holds the same voxels as its image of {name}; one of them is a copy"
                found.append(Problem(subject.name, subject.images[modality].path, reason))
        for other_name, copied in of_others.items():
            reason = (
                f"{', '.join(copied)}: the same voxels as in subject {other_name}; remove the copy"
            )
            found.append(Problem(subject.name, subject.images[copied[0]].path, reason))
        problems.append(found)
    return problems


def raise_for_problems(problems: Sequence[Problem], *, strict: bool = False) -> None:
    """Stop if there are problems, or warnings if those count as well."""
    problems = [problem for problem in problems if strict or not problem.warning]
    if not problems:
        return
    subjects = len({problem.subject for problem in problems})
    text = io.StringIO()
    # A fixed width: the message may end up in a log file, where no terminal tells its own.
    Console(file=text, width=120, markup=False, emoji=False).print(problem_table(problems))
    files = [problem.file for problem in problems if problem.file is not None]
    folders = sorted({printable(str(file.parent)) for file in files})
    where = f"Files lie in {', '.join(folders[:3])}{' ...' if len(folders) > 3 else ''}.\n"
    raise UserError(
        f"Problems: {len(problems)}, in {subjects} of the subjects; repair or remove them. Nothing "
        f"was written.\n{where if folders else ''}{text.getvalue().rstrip()}"
    )


def problem_table(problems: Sequence[Problem]) -> Table:
    """Lay problems out for a terminal, whatever their names hold."""
    table = Table("subject", "file", "reason", title_justify="left")
    for row in problems_as_rows(problems):
        # Text is shown as it is; a string would be searched for markup.
        table.add_row(Text(row["subject"]), Text(Path(row["file"]).name), Text(row["reason"]))
    return table


def problems_as_rows(problems: Iterable[Problem]) -> list[dict[str, str]]:
    """Turn problems into plain text for tables and files."""
    return [
        {
            "subject": printable(problem.subject),
            "file": "" if problem.file is None else printable(str(problem.file)),
            "reason": "warning: " * problem.warning + printable(problem.reason),
        }
        for problem in problems
    ]


def keep_usable(
    subjects: Sequence[Subject], problems: Sequence[Problem]
) -> tuple[list[Subject], list[str]]:
    """Leave out the subjects that have problems."""
    broken = dict.fromkeys(problem.subject for problem in problems if not problem.warning)
    kept = [subject for subject in subjects if subject.name not in broken]
    if not kept:
        raise_for_problems(problems)
    return kept, list(broken)


def _check_subject(
    subject: Subject,
    *,
    description: Description,
    modalities: tuple[str, ...],
    need_segmentation: bool,
) -> _Findings:
    images = {name: subject.images[name] for name in modalities if name in subject.images}
    problems = list(_name_faults(subject.name))
    problems += _rivalries(subject, description, (*modalities, "segmentation"))
    if subject.unlisted:
        reason = f"its folder cannot be looked into ({subject.unlisted})"
        return _Findings([*problems, Problem(subject.name, None, reason)])
    problems += _missing(subject, description, modalities, need_segmentation)
    files = list(images.values())
    if subject.segmentation is not None:
        files.append(subject.segmentation)
    geometries, broken = _headers(subject.name, files)
    problems += broken
    problems += _disagreements(subject.name, geometries)
    findings = _Findings(problems)
    for file, geometry in geometries:
        reasons = [_spacing_fault(geometry, description), _placement_fault(geometry)]
        try:
            if file is subject.segmentation:
                read_classes(file, description)
            else:
                names = [name for name, own in images.items() if own is file]
                reasons.append(_look_at(file, names, findings))
        except UnreadableVolumeError as error:
            reasons.append(error.reason)
        problems += [Problem(subject.name, file.path, reason) for reason in reasons if reason]
    seen = [geometry.orientation for file, geometry in geometries if file in images.values()]
    return replace(findings, orientation=next(iter(seen), None))


def _name_faults(name: str) -> Iterator[Problem]:
    """Names become file names, cells of tables and lines of logs."""
    if not name.isprintable():
        reason = "its name holds characters that cannot be printed; rename its files"
        yield Problem(name, None, reason)
    if len(os.fsencode(name)) > _LONGEST_NAME:
        reason = f"its name is longer than {_LONGEST_NAME} bytes, too long for names of files"
        yield Problem(name, None, reason)


def _rivalries(
    subject: Subject, description: Description, roles: Iterable[str]
) -> Iterator[Problem]:
    patterns = {**description.modalities, "segmentation": description.segmentation}
    files = {**subject.images, "segmentation": subject.segmentation}
    for role in roles:
        file, rivals = files.get(role), subject.rivals.get(role, ())
        # The same file in two roles: the pattern of either also fits what the other means.
        others = {name: own.path for name, own in files.items() if own and name != role}
        shared = {
            name: path
            for name, path in others.items()
            if path in rivals or (file == files[name] and len(patterns[role]) < len(patterns[name]))
        }
        if file is None or not (rivals or shared):
            continue
        what = "the label map" if role == "segmentation" else f"modality {role}"
        names = ", ".join(path.name for path in rivals)
        reason = f"{names} claims to be {what} too; remove one, or make the pattern stricter"
        for name, path in shared.items():
            reason = (
                f"the pattern of {what}, '{patterns[role]}', is too wide: it also fits "
                f"{path.name}, which is {name}"
            )
        yield Problem(subject.name, file.path, reason)


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
    """Files of one subject that do not lie on the grid of most of its files."""
    if not geometries:
        return
    usual_file, usual = max(
        geometries, key=lambda own: sum(_on_one_grid(own[1], other) for _, other in geometries)
    )
    for file, geometry in geometries:
        if geometry.shape != usual.shape:
            reason = f"shape {geometry.shape}, but {usual_file.path.name} has {usual.shape}"
            yield Problem(name, file.path, reason)
        elif not _on_one_grid(geometry, usual):
            difference = np.abs(geometry.affine - usual.affine).max()
            reason = f"affine differs from that of {usual_file.path.name} by up to {difference:.3g}"
            yield Problem(name, file.path, reason)


def _on_one_grid(one: Geometry, other: Geometry) -> bool:
    near = np.allclose(one.affine, other.affine, atol=_AFFINE_TOLERANCE)
    return bool(near) and one.shape == other.shape


def _spacing_fault(geometry: Geometry, description: Description) -> str | None:
    """Distances are told in mm by the voxel sizes of the header, unless they are nominal."""
    low, high = _VOXEL_SIZES
    if description.spacing == "nominal":
        return None
    unit = _UNITS.get(int(geometry.header["xyzt_units"]) & 7)
    if unit is not None:
        return f"the header gives distances in {unit}; expected millimetres"
    said = " x ".join(f"{size:.4g}" for size in geometry.spacing)
    if not all(low <= size <= high for size in geometry.spacing):
        return f"the header says that voxels measure {said} mm; expected {low:g} to {high:g}"
    lengths = np.linalg.norm(geometry.affine[:3, :3], axis=0)
    if not np.allclose(lengths, geometry.spacing, rtol=_SPACING_TOLERANCE):
        other = " x ".join(f"{size:.4g}" for size in lengths)
        return f"the header says that voxels measure {said} mm, its affine says {other} mm"
    return None


def _placement_fault(geometry: Geometry) -> str | None:
    """Where a header has two transforms, programs differ in which one they follow."""
    header = geometry.header
    if header["sform_code"] <= 0 or header["qform_code"] <= 0:
        return None
    ends = [(0, size - 1) for size in geometry.shape]
    corners = np.array([(*corner, 1) for corner in itertools.product(*ends)], dtype=float)
    try:
        with np.errstate(all="ignore"):
            between = corners @ (header.get_sform() - header.get_qform()).T
    except (HeaderDataError, ValueError, ArithmeticError) as error:
        return f"the header has an sform, and a qform that cannot be worked out ({error})"
    apart = np.linalg.norm(between[:, :3], axis=1).max()
    size = np.linalg.norm(geometry.affine[:3, :3], axis=0).min()
    if apart <= _PLACES_TOLERANCE * size:
        return None
    return (
        f"sform and qform place voxels up to {apart:.3g} mm apart; set the code of the wrong one "
        "to 0"
    )


def _look_at(file: ImageFile, names: Sequence[str], findings: _Findings) -> str | None:
    """What is wrong with an image; of a sound one, note what it is compared with others by."""
    volume = read_volume(file)
    if reason := _value_fault(volume):
        return reason
    findings.digests.update(dict.fromkeys(names, _digest(volume)))
    if reason := _background_fault(volume):
        subject = Path(file.path).name
        findings.problems.append(Problem(subject, file.path, reason, warning=True))
    else:
        share = np.count_nonzero(volume) / volume.size
        findings.nonzero.update(dict.fromkeys(names, share))
    return None


def _digest(volume: NDArray[Any]) -> bytes:
    total = hashlib.blake2b(f"{volume.dtype} {volume.shape}".encode(), digest_size=16)
    # As it lies in memory, so that nothing is copied.
    total.update(volume.reshape(-1, order="F").view(np.uint8).data)
    return total.digest()


def _value_fault(volume: NDArray[Any]) -> str | None:
    if volume.dtype.kind == "f" and not np.isfinite(volume).all():
        return f"{int((~np.isfinite(volume)).sum())} voxels are not finite"
    low, high = volume.min(), volume.max()
    if low == high:
        return "the volume is empty, all zero" if low == 0 else f"every voxel is {low:g}"
    if max(abs(float(low)), abs(float(high))) > _LARGEST_VALUE:
        return f"values from {low:.3g} to {high:.3g} are too large for single precision"
    return None


def _background_fault(volume: NDArray[Any]) -> str | None:
    """Brain is told from background by 0, which interpolation and offsets take away."""
    corner = float(volume[0, 0, 0])
    near = _NEAR * (float(volume.max()) - float(volume.min()))
    background = (volume >= corner - near) & (volume <= corner + near)
    background &= volume != 0
    share = np.count_nonzero(background) / volume.size
    if share <= _BACKGROUND:
        return None
    return (
        f"{share:.0%} of its voxels are about {corner:.3g}, as in its corner, and not 0: "
        "background would be taken for brain; set it to 0"
    )
