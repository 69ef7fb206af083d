"""The slices that a report shows, kept in the run folder so that the report needs no images."""

from __future__ import annotations

import json
import math
import statistics
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdnet.data.description import Description
from kdnet.data.layouts import ImageFile, Subject
from kdnet.data.preprocessing import read_classes
from kdnet.data.volumes import read_geometry, read_volume
from kdnet.errors import UserError
from kdnet.evaluation.scoring import Score
from kdnet.files import atomic
from kdnet.results.tables import ROLES, format_number
from kdnet.results.viewing import Turn, Window, fullest_slice, head_window, shown_slices, to_grey

# Every slice of most tumours at 1 mm; on the page about 1 MB per case.
STACK_LIMIT = 80
# Larger slices are thinned by a whole number, so that a page stays a page.
_WIDEST = 256
_DAMAGE = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, RuntimeError),
    *(MemoryError, OverflowError, SyntaxError, zipfile.BadZipFile, zlib.error),
)


@dataclass(frozen=True)
class Stack:
    """Axial slices of one case, to be leafed through.

    Attributes:
        modality: Name of the modality that is shown.
        numbers: Of the slices, from below, from 1.
        image: Grey values, (slices, rows, columns) uint8.
        labels: "reference" or the name of a network to class indices, the same shape.
    """

    modality: str
    numbers: tuple[int, ...]
    image: NDArray[np.uint8]
    labels: dict[str, NDArray[np.uint8]]


@dataclass(frozen=True)
class ShownCase:
    """One axial slice of one case, ready to be drawn, and more of them to leaf through.

    Attributes:
        name: Name of the subject.
        why: Why this case is shown, in words.
        position: Index of the slice from below, from 1, and the number of slices.
        aspect: Height of a pixel divided by its width.
        images: Modality name to grey values, (rows, columns) uint8.
        labels: "reference" or the name of a network to class indices, the same shape.
        stack: The slices around it; None in folders of older runs.
    """

    name: str
    why: str
    position: tuple[int, int]
    aspect: float
    images: dict[str, NDArray[np.uint8]]
    labels: dict[str, NDArray[np.uint8]]
    stack: Stack | None = None


def choose_cases(
    scores: Sequence[Score], *, student: str = "student", baseline: str = "baseline"
) -> dict[str, str]:
    """Choose cases by a rule, so that nobody can pick the prettiest."""
    native = [
        score for score in scores if score.space == "native" and score.postprocessing == "off"
    ]
    names = dict.fromkeys((student, baseline, *(score.role for score in native)))
    values = {name: _mean_dice(native, name) for name in names}
    with_help, without = values[student], values[baseline]
    shared = {case: with_help[case] - without[case] for case in with_help if case in without}
    if shared:
        return _spread(shared, f"{{}} difference between {student} and {baseline}")
    name = next((name for name, found in values.items() if found), None)
    return _spread(values[name], f"{{}} Dice of the {name}") if name else {}


def save_slices(
    path: Path,
    subjects: Mapping[str, Subject],
    description: Description,
    predictions: Path | Mapping[str, Path],
    scores: Sequence[Score],
    *,
    rows: Sequence[str] = ROLES,
    student: str = "student",
    baseline: str = "baseline",
    modality: str | None = None,
) -> None:
    """Cut the slices of the chosen cases and keep them as one compressed file."""
    arrays: dict[str, NDArray[Any]] = {}
    cases: list[dict[str, Any]] = []
    for name, why in choose_cases(scores, student=student, baseline=baseline).items():
        folder = predictions if isinstance(predictions, Path) else predictions[name]
        files = _label_files(subjects[name], folder, rows)
        shown = _cut(subjects[name], why, description, files, modality)
        arrays |= _packed(f"{len(cases)}", shown)
        cases.append(_facts(shown))
    arrays["cases"] = np.array(json.dumps(cases))
    arrays["classes"] = np.array(json.dumps(list(description.classes)))
    with atomic(path) as incomplete, incomplete.open("wb") as stream:
        np.savez_compressed(stream, allow_pickle=False, **arrays)


def load_slices(path: Path) -> tuple[tuple[str, ...], list[ShownCase]]:
    """Read what `save_slices` wrote."""
    if not path.is_file():
        return (), []
    try:
        return _opened(path)
    # What a file that was cut short, overwritten or written by somebody else can raise; numpy
    # would then recommend to unpickle it.
    except _DAMAGE as error:
        raise UserError(
            f"{path} is damaged and cannot be shown. Restore it from a copy, or remove it: the "
            "page then has no pictures."
        ) from error


def _opened(path: Path) -> tuple[tuple[str, ...], list[ShownCase]]:
    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    facts = json.loads(str(arrays["cases"]))
    shown = [_unpacked(f"{index}", case, arrays) for index, case in enumerate(facts)]
    for case in shown:
        _check(case)
    return tuple(map(str, json.loads(str(arrays["classes"])))), shown


def _check(case: ShownCase) -> None:
    """Refuse pictures that are none, or of which two that lie on each other differ in size."""
    flat = [*case.images.values(), *case.labels.values()]
    deep = [] if case.stack is None else [case.stack.image, *case.stack.labels.values()]
    right = bool(case.images) and case.aspect > 0 and math.isfinite(case.aspect)
    for pictures, axes in ((flat, 2), (deep, 3)):
        shapes = {picture.shape for picture in pictures}
        right &= len(shapes) <= 1 and all(len(s) == axes and min(s) > 0 for s in shapes)
        right &= all(picture.dtype == np.uint8 for picture in pictures)
    if case.stack is not None:
        right &= len(case.stack.numbers) == len(case.stack.image)
    if not right:
        raise ValueError("the pictures of a case do not fit")


def _facts(case: ShownCase) -> dict[str, Any]:
    facts = {name: getattr(case, name) for name in ("name", "why", "position", "aspect")}
    if case.stack is not None:
        facts |= {"modality": case.stack.modality, "numbers": case.stack.numbers}
    return facts


def _packed(prefix: str, case: ShownCase) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {}
    arrays |= {f"{prefix}/image/{key}": value for key, value in case.images.items()}
    arrays |= {f"{prefix}/label/{key}": value for key, value in case.labels.items()}
    if case.stack is not None:
        arrays[f"{prefix}/stack/"] = case.stack.image
        arrays |= {f"{prefix}/stacked/{k}": value for k, value in case.stack.labels.items()}
    return arrays


def _unpacked(prefix: str, facts: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> ShownCase:
    parts: dict[str, dict[str, Any]] = {"image": {}, "label": {}, "stack": {}, "stacked": {}}
    for key, value in arrays.items():
        number, _, rest = key.partition("/")
        if number == prefix:
            kind, _, name = rest.partition("/")
            parts[kind][name] = value
    stack = None
    if parts["stack"]:
        numbers = tuple(map(int, facts["numbers"]))
        stack = Stack(facts["modality"], numbers, parts["stack"][""], parts["stacked"])
    return ShownCase(
        name=facts["name"],
        why=facts["why"],
        position=(int(facts["position"][0]), int(facts["position"][1])),
        aspect=float(facts["aspect"]),
        images=parts["image"],
        labels=parts["label"],
        stack=stack,
    )


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


def _cut(
    subject: Subject,
    why: str,
    description: Description,
    files: Mapping[str, ImageFile],
    modality: str | None,
) -> ShownCase:
    """The axial slice with the largest reference, cropped to the head, and those around it."""
    geometry = read_geometry(next(iter(subject.images.values())))
    turn = Turn(geometry.affine)
    volumes = {name: turn(to_grey(read_volume(file))) for name, file in subject.images.items()}
    labels = {name: turn(read_classes(file, description)) for name, file in files.items()}
    depth = next(iter(volumes.values())).shape[2]
    index = fullest_slice(list(labels.values()), depth)
    window = head_window([volume[..., [index]] for volume in volumes.values()])
    step = _step(volumes, window)
    spacing = turn.spacing(geometry.spacing)
    under = modality if modality in volumes else next(iter(volumes))
    return ShownCase(
        name=subject.name,
        why=why,
        position=(index + 1, depth),
        aspect=spacing[1] / spacing[0],
        images={k: volume[..., index].T[window][::step, ::step] for k, volume in volumes.items()},
        labels={k: volume[..., index].T[window][::step, ::step] for k, volume in labels.items()},
        stack=_stack(under, volumes[under], labels),
    )


def _stack(
    modality: str, volume: NDArray[np.uint8], labels: Mapping[str, NDArray[np.uint8]]
) -> Stack:
    chosen = shown_slices(list(labels.values()), volume.shape[2], STACK_LIMIT)
    rows, columns = head_window([volume[..., chosen]])
    step = _step({modality: volume}, (rows, columns))

    def cut(whole: NDArray[np.uint8]) -> NDArray[np.uint8]:
        slices = whole[..., chosen][columns, rows][::step, ::step]
        return np.ascontiguousarray(slices.transpose(2, 1, 0))

    numbers = tuple(index + 1 for index in chosen)
    return Stack(modality, numbers, cut(volume), {k: cut(label) for k, label in labels.items()})


def _step(volumes: Mapping[str, NDArray[np.uint8]], window: Window) -> int:
    """Every how many pixels of a window are kept."""
    rows, columns = window
    size: tuple[int, ...] = next(iter(volumes.values()))[columns, rows].shape[:2]
    return -(-max(size) // _WIDEST)


def _label_files(subject: Subject, folder: Path, rows: Sequence[str]) -> dict[str, ImageFile]:
    files = {} if subject.segmentation is None else {"reference": subject.segmentation}
    for row in rows:
        path = folder / row / f"{subject.name}_seg.nii.gz"
        if path.is_file():
            files[row] = ImageFile(path)
    return files
