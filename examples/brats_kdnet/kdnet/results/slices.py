"""The slices that a page shows: chosen by rule, cut once, kept so that the page needs no images."""

from __future__ import annotations

import base64
import io
import json
import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from nibabel import orientations as nibabel_orientations
from numpy.typing import NDArray
from PIL import Image

from kdnet.data.description import Description
from kdnet.data.preprocessing import read_classes
from kdnet.data.subjects import ImageFile, Subject, find_subjects
from kdnet.data.volumes import read_geometry, read_volume
from kdnet.errors import UserError
from kdnet.files import atomic
from kdnet.results.stored import Results
from kdnet.results.tables import number

Grey = NDArray[np.uint8]

# Every slice of most tumours at 1 mm; on the page about 1 MB per case.
STACK_LIMIT = 80
# Characters; with strip, charts and tables a page stays below 6 MB, which mail still carries.
VIEWER_BUDGET = 4_500_000
# Larger slices are thinned by a whole number, so that a page stays a page.
_WIDEST = 256
# Slices narrower than this keep their pixels visible when they are enlarged.
_COARSE = 120
_MARGIN = 4
_OPACITY = 0.6
# Okabe and Ito's palette without its dark colours, which vanish on a grey image.
_COLOURS = ("#f0e442", "#56b4e9", "#d55e00", "#cc79a7", "#009e73", "#e69f00")
_DAMAGE = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, RuntimeError),
    *(MemoryError, OverflowError, SyntaxError, zipfile.BadZipFile, zlib.error),
)
orientations: Any = nibabel_orientations  # not typed


@dataclass(frozen=True)
class ShownCase:
    """Axial slices of one case, to be leafed through, and the one of them that the strip shows.

    Attributes:
        name: Name of the subject.
        why: Why this case is shown, in words.
        modality: Name of the modality that the stack shows.
        numbers: Of the slices, from below, from 1.
        start: Which of them the strip shows.
        total: Slices of the volume.
        aspect: Height of a pixel divided by its width.
        stack: Grey values, (slices, rows, columns).
        labels: "reference" or the name of a row to class indices, the same shape.
        others: Further modalities to grey values at the strip's slice, (rows, columns).
    """

    name: str
    why: str
    modality: str
    numbers: tuple[int, ...]
    start: int
    total: int
    aspect: float
    stack: Grey
    labels: dict[str, Grey]
    others: dict[str, Grey]


def choose_cases(scores: pd.DataFrame, student: str, baseline: str) -> dict[str, str]:
    """Choose cases by a rule, so that nobody can pick the prettiest: name to reason."""
    native = scores[(scores["space"] == "native") & (scores["postprocessing"] == "off")]
    dice = native.pivot_table(index="case", columns="row", values="dice")
    if student in dice and baseline in dice and len(both := dice[[student, baseline]].dropna()):
        return _spread(
            both[student] - both[baseline], f"difference between {student} and {baseline}"
        )
    row = next((row for row in (student, baseline, *dice) if row in dice), None)
    return {} if row is None else _spread(dice[row].dropna(), f"Dice of the {row}")


def cut_slices(results: Results) -> str:
    """Cut the slices of the chosen cases, unless that is done; return what is to be said."""
    maps = _label_maps(results)
    path, scored = results.root / "slices.npz", results.root / "scores.csv"
    if not (path.is_file() and path.stat().st_mtime >= scored.stat().st_mtime):
        folder = _images(results)
        if not maps:
            return "The label maps were not kept, so there is no figure."
        if folder is None:
            return "The images are not where config.yaml names them, so there is no figure."
        description, found = find_subjects(folder, results.description)
        subjects = {subject.name: subject for subject in found if subject.name in maps}
        known = results.scores[results.scores["case"].isin(subjects)]
        chosen = choose_cases(known, results.student, results.baseline)
        under = next(iter(results.seen), "")
        shown = [
            _cut(subjects[name], why, description, maps[name], under)
            for name, why in chosen.items()
        ]
        save_slices(path, description.classes, shown)
    cases = results.scores["case"].unique()
    count = sum(case in maps for case in cases)
    few = f"Chosen among the {count} of {len(cases)} cases whose label maps were found."
    return few * (0 < count < len(cases))


def save_slices(path: Path, classes: Sequence[str], cases: Sequence[ShownCase]) -> None:
    """Keep the slices of some cases as one compressed file."""
    arrays: dict[str, NDArray[Any]] = {}
    facts = []
    for index, case in enumerate(cases):
        arrays[f"{index}/stack"] = case.stack
        arrays |= {f"{index}/labels/{name}": values for name, values in case.labels.items()}
        arrays |= {f"{index}/others/{name}": values for name, values in case.others.items()}
        facts.append({k: v for k, v in vars(case).items() if k not in _ARRAYS})
    arrays["facts"] = np.array(json.dumps({"classes": [*classes], "cases": facts}))
    with atomic(path) as incomplete, incomplete.open("wb") as stream:
        np.savez_compressed(stream, allow_pickle=False, **arrays)


def load_slices(path: Path) -> tuple[tuple[str, ...], list[ShownCase]]:
    """Read what `save_slices` wrote: names of the classes, and the cases."""
    if not path.is_file():
        return (), []
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        facts = json.loads(str(arrays["facts"]))
        cases = [_unpacked(index, case, arrays) for index, case in enumerate(facts["cases"])]
        return tuple(map(str, facts["classes"])), cases
    # What a file that was cut short, overwritten or written by somebody else can raise; numpy
    # would then recommend to unpickle it.
    except _DAMAGE as error:
        raise UserError(
            f"{path} is damaged and cannot be shown. Restore it from a copy, or remove it: the "
            "page then has no pictures."
        ) from error


def pictures(path: Path, seen: Sequence[str], rows: Sequence[str]) -> dict[str, Any]:
    """The part of a page about single cases: strips, what the viewer's script reads, a legend."""
    classes, cases = load_slices(path)
    viewer, left_out, budget = [], [], VIEWER_BUDGET
    for case in cases:
        sheet = _sheets(case, rows)
        size = len(sheet["image"]) + sum(len(picture) for _, picture in sheet["labels"])
        if size > budget:
            left_out.append(case.name)
        else:
            budget -= size
            viewer.append(sheet)
    return {
        "legend": [(name, label_colour(n)) for n, name in enumerate(classes) if n],
        "strips": [(case, tiles(case, seen, rows[:3]), _others(case)) for case in cases],
        "viewer": viewer,
        "left_out": left_out,
    }


def tiles(case: ShownCase, seen: Sequence[str], rows: Sequence[str]) -> list[dict[str, Any]]:
    """The strip of one case: what the student sees, the reference, and the predictions."""
    grey = case.stack[case.start]
    shown = [_tile(case.modality, grey, case, "seen by the student" * (case.modality in seen))]
    shown += [
        _tile(name, case.others[name], case, "seen by the student")
        for name in case.others
        if name in seen
    ]
    for who in ("reference", *rows):
        if who in case.labels:
            shown.append(_tile(who, _overlaid(grey, case.labels[who][case.start]), case))
    return shown


def label_colour(index: int) -> str:
    """Colour of a class."""
    return _COLOURS[(index - 1) % len(_COLOURS)]


_ARRAYS = ("stack", "labels", "others")


def _spread(values: pd.Series[Any], wording: str) -> dict[str, str]:
    order = sorted(values.index, key=lambda case: (values[case], case))
    picked = {"lowest": order[0], "median": order[(len(order) - 1) // 2], "highest": order[-1]}
    chosen: dict[str, str] = {}
    for rank, case in picked.items():
        chosen.setdefault(case, f"{rank} {wording} ({number(values[case], signed='+')})")
    return chosen


def _label_maps(results: Results) -> dict[str, dict[str, Path]]:
    """Case to the label map of every row, of the first seed that has it."""
    found: dict[str, dict[str, Path]] = {}
    for row in results.rows:
        for unit in results.units(row):
            for path in sorted((unit / "predictions").glob("*_seg.nii.gz")):
                found.setdefault(path.name.removesuffix("_seg.nii.gz"), {}).setdefault(row, path)
    return found


def _images(results: Results) -> Path | None:
    """Root of the data set: the one that is named, else that of the phantoms."""
    named, cache = (results.config.get(name) for name in ("data_root", "cache_dir"))
    if isinstance(named, str):
        return Path(named) if Path(named).is_dir() else None
    folder = Path(cache) if isinstance(cache, str) else results.root / "cache"
    return next((path.parent for path in sorted(folder.glob("*/phantom.json"))), None)


def _cut(
    subject: Subject, why: str, description: Description, maps: Mapping[str, Path], under: str
) -> ShownCase:
    """The slices around the one with the largest reference, cropped to the head."""
    geometry = read_geometry(next(iter(subject.images.values())))
    # Rows run from the front of the head to its back, columns from the patient's right to the
    # left, as radiologists look at it.
    change = orientations.ornt_transform(
        orientations.io_orientation(geometry.affine), orientations.axcodes2ornt(("L", "P", "S"))
    )

    def turned(volume: NDArray[Any]) -> Grey:
        """Slices from below, rows, columns."""
        return np.asarray(orientations.apply_orientation(volume, change)).transpose(2, 1, 0)

    files = {} if subject.segmentation is None else {"reference": subject.segmentation}
    files |= {row: ImageFile(path) for row, path in maps.items()}
    labels = {who: turned(read_classes(file, description)) for who, file in files.items()}
    volumes = {name: turned(_to_grey(read_volume(file))) for name, file in subject.images.items()}
    modality = under if under in volumes else next(iter(volumes))
    depth = len(volumes[modality])
    fullest = _fullest(list(labels.values()), depth)
    chosen = _shown_slices(list(labels.values()), fullest, depth)
    rows, columns = _window(volumes[modality][chosen])
    step = -(-max(volumes[modality][0, rows, columns].shape) // _WIDEST)

    def cropped(stack: Grey) -> Grey:
        return np.ascontiguousarray(stack[..., rows, columns][..., ::step, ::step])

    sizes = dict(zip(change[:, 0].astype(int).tolist(), geometry.spacing, strict=True))
    return ShownCase(
        name=subject.name,
        why=why,
        modality=modality,
        numbers=tuple(index + 1 for index in chosen),
        start=chosen.index(fullest),
        total=depth,
        aspect=float(sizes[1] / sizes[0]),
        stack=cropped(volumes[modality][chosen]),
        labels={who: cropped(volume[chosen]) for who, volume in labels.items()},
        others={k: cropped(v[fullest]) for k, v in volumes.items() if k != modality},
    )


def _to_grey(volume: NDArray[Any]) -> Grey:
    """Scale a volume to grey values, black to white."""
    volume = volume.astype(np.float32)
    inside = volume[volume != 0]
    low, high = np.percentile(inside, [1, 99.5]) if inside.size else (0.0, 1.0)
    scaled = (volume - low) / max(float(high - low), 1e-6)
    return (np.where(volume != 0, scaled.clip(0, 1), 0) * 255).astype(np.uint8)


def _fullest(labels: Sequence[Grey], depth: int) -> int:
    """The axial slice with most tumour, of the first label map that has any."""
    for volume in labels:
        if volume.any():
            return int((volume > 0).sum(axis=(1, 2)).argmax())
    return depth // 2


def _shown_slices(labels: Sequence[Grey], fullest: int, depth: int) -> list[int]:
    """Those with tumour, a margin, and no more than fit; the fullest is always among them."""
    filled = np.any([volume.any(axis=(1, 2)) for volume in labels], axis=0) if labels else []
    places = np.flatnonzero(filled) if len(labels) else np.empty(0)
    margin = max(2, depth // 20)
    first = max(int(places[0]) - margin, 0) if places.size else 0
    last = min(int(places[-1]) + margin, depth - 1) if places.size else depth - 1
    step = -(-(last - first + 1) // STACK_LIMIT)
    return list(range(first + (fullest - first) % step, last + 1, step))


def _window(stack: Grey) -> tuple[slice, slice]:
    """What there is to see in a stack of slices."""
    filled: NDArray[np.bool_] = np.any(stack, axis=0)
    if not filled.any():
        return slice(None), slice(None)
    places = [np.flatnonzero(filled.any(axis=axis)) for axis in (1, 0)]
    rows, columns = (slice(max(int(p[0]) - _MARGIN, 0), int(p[-1]) + 1 + _MARGIN) for p in places)
    return rows, columns


def _unpacked(index: int, facts: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> ShownCase:
    parts: dict[str, dict[str, Any]] = {"labels": {}, "others": {}}
    for key, value in arrays.items():
        number_of, _, rest = key.partition("/")
        kind, _, name = rest.partition("/")
        if number_of == str(index) and kind in parts:
            parts[kind][name] = value
    case = ShownCase(
        name=str(facts["name"]),
        why=str(facts["why"]),
        modality=str(facts["modality"]),
        numbers=tuple(map(int, facts["numbers"])),
        start=int(facts["start"]),
        total=int(facts["total"]),
        aspect=float(facts["aspect"]),
        stack=arrays[f"{index}/stack"],
        **parts,
    )
    numbers, aspect, stack = case.numbers, case.aspect, case.stack
    flat = [*case.others.values()]
    right = aspect > 0 and math.isfinite(aspect) and 0 <= case.start < len(numbers) == len(stack)
    right &= stack.ndim == 3 and min(stack.shape) > 0
    right &= all(volume.shape == stack.shape for volume in case.labels.values())
    right &= all(picture.shape == stack.shape[1:] for picture in flat)
    if not right or any(p.dtype != np.uint8 for p in (stack, *flat, *case.labels.values())):
        raise ValueError("the pictures of a case do not fit")
    return case


def _sheets(case: ShownCase, rows: Sequence[str]) -> dict[str, Any]:
    """The stack of one case as sheets of tiles, one for the image and one for each label map."""
    count, height, width = case.stack.shape
    columns = math.ceil(math.sqrt(count))
    order = [who for who in ("reference", *rows) if who in case.labels]
    return {
        "name": case.name,
        "why": case.why,
        "total": case.total,
        "start": case.start,
        "numbers": case.numbers,
        "columns": columns,
        "width": width,
        "height": height,
        "ratio": round(width / (height * case.aspect), 4),
        "modality": case.modality,
        "image": _uri(Image.fromarray(_laid_out(case.stack, columns))),
        "labels": [(w, _uri(_coloured(_laid_out(case.labels[w], columns)))) for w in order],
    }


def _others(case: ShownCase) -> list[dict[str, Any]]:
    return [_tile(name, grey, case) for name, grey in case.others.items()]


def _tile(title: str, picture: Grey, case: ShownCase, note: str = "") -> dict[str, Any]:
    rows, columns = picture.shape[:2]
    return {
        "title": title,
        "note": note,
        "source": _uri(Image.fromarray(np.ascontiguousarray(picture))),
        "width": columns / (rows * case.aspect),
        "coarse": columns < _COARSE,
    }


def _laid_out(slices: Grey, columns: int) -> Grey:
    """Slices side by side, row after row; the last row is filled with zeros."""
    count, height, width = slices.shape
    rows = -(-count // columns)
    sheet = np.zeros((rows * columns, height, width), dtype=np.uint8)
    sheet[:count] = slices
    sheet = sheet.reshape(rows, columns, height, width).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(sheet.reshape(rows * height, columns * width))


def _coloured(classes: Grey) -> Image.Image:
    """Class indices as a picture with a palette, background transparent."""
    picture = Image.fromarray(classes, mode="P")
    colours = [0, 0, 0]
    for index in range(1, int(classes.max()) + 1):
        colours += [round(255 * part) for part in mpl.colors.to_rgb(label_colour(index))]
    picture.putpalette(colours)
    picture.info["transparency"] = 0
    return picture


def _overlaid(grey: Grey, classes: Grey) -> Grey:
    picture = np.repeat(grey[..., None].astype(np.float64), 3, axis=2)
    for index in np.unique(classes[classes > 0]):
        colour = 255 * np.array(mpl.colors.to_rgb(label_colour(int(index))))
        where = classes == index
        picture[where] = (1 - _OPACITY) * picture[where] + _OPACITY * colour
    return picture.round().astype(np.uint8)


def _uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
