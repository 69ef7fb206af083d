"""Looking at every file of a data set before training, and reporting all problems at once."""

import hashlib
import itertools
import os
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from kdnet.data.description import Description
from kdnet.data.loading import map_parallel
from kdnet.data.preprocessing import read_classes
from kdnet.data.subjects import SEGMENTATION, Subject
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
#: By what factor the share of non-zero voxels, and a voxel's size, may differ from the usual ones.
_SHARE_FACTOR, _SIZE_FACTOR = 2.5, 1.5
#: Voxels near the value of the corner are background if they are so many, and near so far.
_BACKGROUND, _NEAR = 0.05, 1e-4
#: File systems allow 255 bytes; names of subjects get endings such as those of the cache.
_LONGEST_NAME = 180

#: A file at fault, None where it is missing, and what is wrong.
Fault = tuple[Path | None, str]


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


@dataclass
class _Findings:
    """What one subject's files say.

    Attributes:
        problems: What is wrong with them alone.
        orientation: How their axes run.
        digests: Of the voxels of sound images, by modality.
        nonzero: Shares of their voxels that are not zero, by modality.
    """

    problems: list[Problem]
    orientation: str = ""
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
    typical: Mapping[str, float] | None = None,
) -> list[Problem]:
    """Read every file once and collect whatever is wrong with any of them."""
    images = tuple(description.modalities if modalities is None else modalities)
    needed = (*images, SEGMENTATION) if need_segmentation else images
    found = map_parallel(
        lambda subject: _check_subject(subject, description, (*images, SEGMENTATION), needed),
        subjects,
        workers=workers,
        title="Checking subjects",
        progress=progress,
    )
    problems = [
        *itertools.chain.from_iterable(own.problems for own in found),
        *_turned(subjects, [own.orientation for own in found]),
        *_copies(subjects, [own.digests for own in found]),
        *_outlying(subjects, [own.nonzero for own in found], typical or {}),
    ]
    # In the order of the subjects, whichever check found a problem.
    places = {subject.name: place for place, subject in enumerate(subjects)}
    return sorted(problems, key=lambda problem: places[problem.subject])


def unlike_training(
    subjects: Sequence[Subject],
    modalities: Sequence[str],
    orientation: str,
    spacing: Sequence[float],
) -> Iterator[Problem]:
    """Tell of axes, and warn of sizes of voxels, that a network has not seen in training."""
    for subject in subjects:
        file = next(subject.images[name] for name in modalities if name in subject.images)
        found = read_geometry(file)
        if orientation and found.orientation != orientation:
            reason = f"its axes run {found.orientation}, those of the training data {orientation}"
            yield Problem(subject.name, file.path, f"{reason}; turn it there first")
        # Models of before spacing was kept have none.
        ratios = [own / usual for own, usual in zip(found.spacing, spacing, strict=False)]
        if not all(1 / _SIZE_FACTOR <= ratio <= _SIZE_FACTOR for ratio in ratios):
            reason = f"voxels measure {_edges(found.spacing)} mm, in training {_edges(spacing)} mm"
            yield Problem(subject.name, file.path, f"{reason}; resample it", warning=True)


def raise_for_problems(problems: Sequence[Problem], *, strict: bool = False) -> None:
    """Stop if there are problems, or warnings if those count as well."""
    problems = [problem for problem in problems if strict or not problem.warning]
    if problems:
        count = len({problem.subject for problem in problems})
        raise UserError(
            f"Problems: {len(problems)}, in {count} of the subjects; repair or remove them. "
            f"Nothing was written.\n{listed(problems)}"
        )


def listed(problems: Iterable[Problem]) -> str:
    """Say one problem a line."""
    rows = problems_as_rows(problems)
    return "\n".join(f"{row['file'] or row['subject']}: {row['reason']}" for row in rows)


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
    # Leaving everybody out is no repair: say what is wrong instead.
    if not kept:
        raise_for_problems(problems)
    return kept, list(broken)


def _check_subject(
    subject: Subject, description: Description, roles: Sequence[str], needed: Sequence[str]
) -> _Findings:
    faults: list[Fault] = [
        *_name_faults(subject.name),
        *_rivalries(subject, description.patterns, roles),
        *_missing(subject, description.patterns, needed),
    ]
    findings = _Findings([])
    geometries: dict[Path, Geometry] = {}
    for role, file in subject.files.items():
        if role not in roles:
            continue
        reasons: list[str] = []
        try:
            geometry = geometries[file.path] = read_geometry(file)
            reasons += _spacing_fault(geometry, description)
            reasons += _placement_fault(geometry)
            if role == SEGMENTATION:
                read_classes(file, description)
            else:
                findings.orientation = findings.orientation or geometry.orientation
                reasons += _look_at(subject, role, findings, description)
        except UnreadableVolumeError as error:
            reasons.append(error.reason)
        faults += [(file.path, reason) for reason in reasons]
    faults += _disagreements(geometries)
    findings.problems += [Problem(subject.name, path, reason) for path, reason in faults]
    return findings


def _look_at(
    subject: Subject, modality: str, findings: _Findings, description: Description
) -> Iterator[str]:
    """Say what is wrong with an image; note what a sound one is compared with others by."""
    file = subject.images[modality]
    volume = read_volume(file)
    if fault := _value_fault(volume):
        yield fault
        return
    # Only of sound images: two that are all zero are no copies of each other.
    findings.digests[modality] = _digest(volume)
    if description.background == "noise":
        return
    if fault := _background_fault(volume):
        findings.problems.append(Problem(subject.name, file.path, fault, warning=True))
    else:
        findings.nonzero[modality] = float(np.count_nonzero(volume) / volume.size)


# Of one subject


def _name_faults(name: str) -> Iterator[Fault]:
    """Names become file names, cells of tables and lines of logs."""
    if not name.isprintable():
        yield None, "its name holds characters that cannot be printed; rename its files"
    if len(os.fsencode(name)) > _LONGEST_NAME:
        yield None, f"its name is longer than {_LONGEST_NAME} bytes, too long for names of files"


def _rivalries(
    subject: Subject, patterns: Mapping[str, str], roles: Iterable[str]
) -> Iterator[Fault]:
    """Several files for one role, or one file for several, as a pattern that is too wide finds."""
    for role in roles:
        file, rivals = subject.files.get(role), subject.rivals.get(role, ())
        # Of two patterns that fit one file the longer one means it.
        width = (len(patterns[role]), role)
        others = [
            f"{other.path.name}, which is {name}"
            for name, other in subject.files.items()
            if (other.path in rivals and name != role)
            or (other == file and (len(patterns[name]), name) > width)
        ]
        if file is not None and others:
            pattern = f"the pattern of {_called(role)}, '{patterns[role]}'"
            found = " and ".join(others)
            yield file.path, f"{pattern}, is too wide: it also fits {found}; make it stricter"
        elif file is not None and rivals:
            claims = f"{', '.join(path.name for path in rivals)} claims to be {_called(role)} too"
            yield file.path, f"{claims}; remove one, or make the pattern stricter"


def _missing(
    subject: Subject, patterns: Mapping[str, str], roles: Iterable[str]
) -> Iterator[Fault]:
    if subject.unlisted:
        yield None, f"its folder cannot be looked into ({subject.unlisted})"
        return
    for role in roles:
        if role not in subject.files:
            expected = patterns[role].replace("{subject}", subject.name)
            # Subjects without a reference need not be lost: distillation gains from them.
            cure = "; subjects without one go into a folder of their own, --unlabelled-root"
            yield (
                None,
                f"{_called(role)} is missing, expected {expected}{cure * (role == SEGMENTATION)}",
            )


def _called(role: str) -> str:
    return "the label map" if role == SEGMENTATION else f"modality {role}"


def _disagreements(geometries: Mapping[Path, Geometry]) -> Iterator[Fault]:
    """Files of one subject that do not lie on the grid of most of its files."""
    grids = [*geometries.values()]
    agreeing = [sum(_on_one_grid(own, other) for other in grids) for own in grids]
    for path, geometry in geometries.items():
        usual_path, usual = [*geometries.items()][agreeing.index(max(agreeing))]
        if geometry.shape != usual.shape:
            yield path, f"shape {geometry.shape}, but {usual_path.name} has {usual.shape}"
        elif not _on_one_grid(geometry, usual):
            most = np.abs(geometry.affine - usual.affine).max()
            yield path, f"affine differs from that of {usual_path.name} by up to {most:.3g}"


def _on_one_grid(one: Geometry, other: Geometry) -> bool:
    # Absolutely, as entries are about 1 or offsets in mm.
    near = np.allclose(one.affine, other.affine, atol=_AFFINE_TOLERANCE)
    return bool(near) and one.shape == other.shape


def _edges(size: Iterable[float]) -> str:
    return " x ".join(f"{edge:.4g}" for edge in size)


def _spacing_fault(geometry: Geometry, description: Description) -> Iterator[str]:
    """Distances are told in mm by the voxel sizes of the header, unless they are nominal."""
    if description.spacing == "nominal":
        return
    low, high = _VOXEL_SIZES
    unit = _UNITS.get(int(geometry.header["xyzt_units"]) & 7)
    lengths = np.linalg.norm(geometry.affine[:3, :3], axis=0)
    said = f"the header says that voxels measure {_edges(geometry.spacing)} mm"
    if unit is not None:
        yield f"the header gives distances in {unit}; expected millimetres"
    elif not all(low <= size <= high for size in geometry.spacing):
        yield f"{said}; expected {low:g} to {high:g}"
    elif not np.allclose(lengths, geometry.spacing, rtol=_SPACING_TOLERANCE):
        yield f"{said}, its affine says {_edges(lengths)} mm"


def _placement_fault(geometry: Geometry) -> Iterator[str]:
    """Where a header has two transforms, programs differ in which one they follow."""
    header = geometry.header
    if header["sform_code"] <= 0 or header["qform_code"] <= 0:
        return
    # The corners move farthest when a rotation differs.
    ends = [(0, size - 1) for size in geometry.shape]
    corners = np.array([(*corner, 1) for corner in itertools.product(*ends)], dtype=float)
    try:
        with np.errstate(all="ignore"):
            between = corners @ (header.get_sform() - header.get_qform()).T
    except (HeaderDataError, ValueError, ArithmeticError) as error:
        yield f"the header has an sform, and a qform that cannot be worked out ({error})"
        return
    apart = np.linalg.norm(between[:, :3], axis=1).max()
    if apart > _PLACES_TOLERANCE * np.linalg.norm(geometry.affine[:3, :3], axis=0).min():
        yield f"sform and qform place voxels up to {apart:.3g} mm apart; give the wrong one code 0"


def _value_fault(volume: NDArray[Any]) -> str:
    if volume.dtype.kind == "f" and not np.isfinite(volume).all():
        return f"{int((~np.isfinite(volume)).sum())} voxels are not finite"
    low, high = volume.min(), volume.max()
    if low == high:
        return "the volume is empty, all zero" if low == 0 else f"every voxel is {low:g}"
    if max(abs(float(low)), abs(float(high))) > _LARGEST_VALUE:
        return f"values from {low:.3g} to {high:.3g} are too large for single precision"
    return ""


def _background_fault(volume: NDArray[Any]) -> str:
    """Brain is told from background by 0, which interpolation and offsets take away."""
    # No brain reaches into the corner of an image.
    corner = float(volume[0, 0, 0])
    near = _NEAR * (float(volume.max()) - float(volume.min()))
    background = (volume >= corner - near) & (volume <= corner + near) & (volume != 0)
    share = np.count_nonzero(background) / volume.size
    if share <= _BACKGROUND:
        return ""
    return (
        f"{share:.0%} of its voxels are about {corner:.3g}, as in its corner, and not 0: "
        "background would be taken for brain; set it to 0, or say 'background: noise' in the "
        "description of the data set"
    )


def _digest(volume: NDArray[Any]) -> bytes:
    total = hashlib.blake2b(f"{volume.dtype} {volume.shape}".encode(), digest_size=16)
    # As it lies in memory, so that nothing is copied.
    total.update(volume.reshape(-1, order="F").view(np.uint8).data)
    return total.digest()


# Among subjects


def _turned(subjects: Sequence[Subject], orientations: Sequence[str]) -> Iterator[Problem]:
    """Subjects whose axes run otherwise than in most; a network would see them turned."""
    known = [orientation for orientation in orientations if orientation]
    usual = max(known, key=known.count, default="")
    for subject, found in zip(subjects, orientations, strict=True):
        if found not in {"", usual}:
            reason = f"its axes run {found}, those of most subjects {usual}; reorient it first"
            yield Problem(subject.name, next(iter(subject.images.values())).path, reason)


def _copies(
    subjects: Sequence[Subject], digests: Sequence[Mapping[str, bytes]]
) -> Iterator[Problem]:
    """Images with the voxels of an earlier one: a patient under two names, or a file misnamed."""
    first: dict[bytes, tuple[Subject, str]] = {}
    for subject, own in zip(subjects, digests, strict=True):
        of_others: dict[str, list[str]] = {}
        for modality, content in own.items():
            other, name = first.setdefault(content, (subject, modality))
            file = subject.images[modality]
            if other is not subject:
                of_others.setdefault(other.name, []).append(modality)
            # One file under two names is told as a pattern that is too wide.
            elif file != subject.images[name]:
                reason = f"it holds the same voxels as its image of {name}; one of them is a copy"
                yield Problem(subject.name, file.path, reason)
        for name, copied in of_others.items():
            reason = f"{', '.join(copied)}: the same voxels as in subject {name}; remove the copy"
            yield Problem(subject.name, subject.images[copied[0]].path, reason)


def _outlying(
    subjects: Sequence[Subject],
    shares: Sequence[Mapping[str, float]],
    typical: Mapping[str, float],
) -> Iterator[Problem]:
    """Warn of unusual shares of non-zero voxels: these are what normalisation takes for brain.

    Usual is what is typical of a modality, or else what most subjects have, and what the other
    images of the subject have.
    """
    names = dict.fromkeys(itertools.chain(*shares))
    usual = {n: statistics.median(own[n] for own in shares if n in own) for n in names}
    usual |= typical
    for subject, own in zip(subjects, shares, strict=True):
        for name, share in own.items():
            expected = (usual[name], statistics.median(own.values()))
            far = [one for one in expected if not 1 / _SHARE_FACTOR <= share / one <= _SHARE_FACTOR]
            if far:
                reason = (
                    f"{share:.0%} of its voxels are not 0, usual are {far[0]:.0%}: is the "
                    "background 0, and is there a skull as in the other images?"
                )
                yield Problem(subject.name, subject.images[name].path, reason, warning=True)
