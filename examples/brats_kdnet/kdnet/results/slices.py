"""The slices that a page shows: chosen by rule, cut once, kept so that the page needs no images."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
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
from kdnet.evaluation.scoring import scored_in
from kdnet.files import write_text
from kdnet.results.stored import Results, optional_mapping
from kdnet.results.tables import number

Grey = NDArray[np.uint8]

FILE = "slices.json"
# Every slice of most tumours at 1 mm; on the page about 1 MB per case.
STACK_LIMIT = 80
# Larger slices are thinned by a whole number, so that a page stays a page.
_WIDEST = 256
# Slices narrower than this keep their pixels visible when they are enlarged.
_COARSE = 120
_MARGIN = 4
_OPACITY = 0.6
# Okabe and Ito's palette without its dark colours, which vanish on a grey image.
_COLOURS = ("#f0e442", "#56b4e9", "#d55e00", "#cc79a7", "#009e73", "#e69f00")
# The form of the file: what the page's template reads; the viewer's sheets are for its script.
_TILE = {"title": "", "note": "", "source": "", "ratio": 0.0, "coarse": False}
_CASE = {"name": "", "why": "", "number": 0, "total": 0, "strip": [_TILE]}
_FORM: dict[str, Any] = {"legend": [[""]], "cases": [_CASE], "viewer": []}
orientations: Any = nibabel_orientations  # not typed


def choose_cases(
    scores: pd.DataFrame, student: str, baseline: str, label: Callable[[str], str] = str
) -> dict[str, str]:
    """Choose cases by a rule, so that nobody can pick the prettiest: name to reason."""
    dice = scored_in(scores).pivot_table(index="case", columns="row", values="dice")
    if student in dice and baseline in dice and len(both := dice[[student, baseline]].dropna()):
        gain = both[student] - both[baseline]
        return _spread(gain, f"difference between {label(student)} and {label(baseline)}")
    row = next((row for row in (student, baseline, *dice) if row in dice), None)
    return {} if row is None else _spread(dice[row].dropna(), f"Dice of the {label(row)}")


def cut_slices(results: Results) -> str:
    """Cut the slices of the chosen cases, unless that is done; return what is to be said."""
    maps = _label_maps(results)
    path, scored = results.root / FILE, results.root / "scores.csv"
    if not (path.is_file() and path.stat().st_mtime >= scored.stat().st_mtime):
        folder = _images(results)
        if not maps:
            return "The label maps were not kept, so there is no figure."
        if folder is None:
            return "The images are not where config.yaml names them, so there is no figure."
        description, found = find_subjects(folder, results.description)
        subjects = {subject.name: subject for subject in found if subject.name in maps}
        known = results.scores[results.scores["case"].isin(subjects)]
        chosen = choose_cases(known, results.student, results.baseline, results.label)
        cut = [
            _cut(subjects[name], why, description, maps[name], results.seen)
            for name, why in chosen.items()
        ]
        legend = [[name, label_colour(n)] for n, name in enumerate(description.classes) if n]
        cases, viewer = [case for case, _ in cut], [sheets for _, sheets in cut]
        write_text(path, json.dumps({"legend": legend, "cases": cases, "viewer": viewer}))
    cases_scored = results.scores["case"].unique()
    count = sum(case in maps for case in cases_scored)
    few = f"Chosen among the {count} of {len(cases_scored)} cases whose label maps were found."
    return few * (0 < count < len(cases_scored))


def load_slices(path: Path) -> dict[str, Any]:
    """Read what was cut: legend, cases with their strips, and the viewer's sheets."""
    content = optional_mapping(path) or {"legend": [], "cases": [], "viewer": []}
    if not _alike(content, _FORM):
        raise UserError(
            f"{path} is damaged and cannot be shown. Restore it from a copy, or remove it: it is "
            "cut again where the images are, else the page has no pictures."
        )
    return content


def label_colour(index: int) -> str:
    """Colour of a class."""
    return _COLOURS[(index - 1) % len(_COLOURS)]


def _alike(value: Any, form: Any) -> bool:
    """Say whether a value has the keys and types of a form, in every item of a list."""
    if isinstance(form, dict):
        fits = isinstance(value, dict) and value.keys() == form.keys()
        return fits and all(_alike(value[key], part) for key, part in form.items())
    if isinstance(form, list):
        return isinstance(value, list) and all(
            _alike(item, part) for item in value for part in form
        )
    return type(value) is type(form)


def _spread(values: pd.Series[Any], wording: str) -> dict[str, str]:
    order = sorted(values.index, key=lambda case: (values[case], case))
    picked = {"lowest": order[0], "median": order[(len(order) - 1) // 2], "highest": order[-1]}
    chosen: dict[str, str] = {}
    for rank, case in picked.items():
        chosen.setdefault(case, f"{rank} {wording} ({number(values[case], signed='+')})")
    return chosen


def _label_maps(results: Results) -> dict[str, dict[str, Path]]:
    """Case to the label map of every row, of the first seed that has it; those compared first."""
    order = [results.baseline, results.student, *results.teachers, *results.rows]
    found: dict[str, dict[str, Path]] = {}
    for row in dict.fromkeys(row for row in order if row):
        for unit in results.units(row):
            for path in sorted((unit / "predictions").glob("*_seg.nii.gz")):
                case = path.name.removesuffix("_seg.nii.gz")
                found.setdefault(case, {}).setdefault(results.label(row), path)
    return found


def _images(results: Results) -> Path | None:
    """Root of the data set: the one that is named, else that of the phantoms."""
    named, cache = (results.config.get(name) for name in ("data_root", "cache_dir"))
    if isinstance(named, str):
        return Path(named) if Path(named).is_dir() else None
    folder = Path(cache) if isinstance(cache, str) else results.root / "cache"
    return next((path.parent for path in sorted(folder.glob("*/phantom.json"))), None)


def _cut(
    subject: Subject,
    why: str,
    description: Description,
    maps: Mapping[str, Path],
    seen: Sequence[str],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The strip of one case and its sheets: slices around the fullest one, cropped to the head."""
    volumes, labels, aspect = _turned(subject, description, maps)
    modality = next((name for name in seen if name in volumes), next(iter(volumes)))
    depth = len(volumes[modality])
    fullest = _fullest([*labels.values()], depth)
    chosen = _shown_slices([*labels.values()], fullest, depth)
    rows, columns = _window(volumes[modality][chosen])
    step = -(-max(volumes[modality][0, rows, columns].shape) // _WIDEST)

    def cropped(slices: Grey) -> Grey:
        return np.ascontiguousarray(slices[..., rows, columns][..., ::step, ::step])

    stack = cropped(volumes[modality][chosen])
    layers = {who: cropped(volume[chosen]) for who, volume in labels.items()}
    start, (count, height, width) = chosen.index(fullest), stack.shape
    strip = [
        (
            name,
            Image.fromarray(cropped(volumes[name][fullest])),
            "seen by the student" * (name in seen),
        )
        for name in dict.fromkeys([modality, *volumes])
    ]
    # Beside the reference: what is compared, and the first teacher.
    strip += [(who, _overlaid(stack[start], layers[who][start]), "") for who in [*layers][:4]]
    shape = {"ratio": float(width / (height * aspect)), "coarse": width < _COARSE}
    place = {"name": subject.name, "why": why, "total": depth}
    tiles = [{"title": t, "note": n, "source": _uri(p), **shape} for t, p, n in strip]
    across = math.ceil(math.sqrt(count))
    sheets = {
        "start": start,
        "numbers": [index + 1 for index in chosen],
        "columns": across,
        "width": width,
        "height": height,
        "modality": modality,
        "image": _uri(Image.fromarray(_laid_out(stack, across))),
        "labels": [(who, _uri(_coloured(_laid_out(s, across)))) for who, s in layers.items()],
    }
    return place | {"number": fullest + 1, "strip": tiles}, place | shape | sheets


def _turned(
    subject: Subject, description: Description, maps: Mapping[str, Path]
) -> tuple[dict[str, Grey], dict[str, Grey], float]:
    """Volumes and label maps as slices from below, and the height of a pixel by its width."""
    geometry = read_geometry(next(iter(subject.images.values())))
    # Rows run from the front of the head to its back, columns from the patient's right to the
    # left, as radiologists look at it.
    change = orientations.ornt_transform(
        orientations.io_orientation(geometry.affine), orientations.axcodes2ornt(("L", "P", "S"))
    )

    def turned(volume: NDArray[Any]) -> Grey:
        return np.asarray(orientations.apply_orientation(volume, change)).transpose(2, 1, 0)

    files = {} if subject.segmentation is None else {"reference": subject.segmentation}
    files |= {row: ImageFile(path) for row, path in maps.items()}
    labels = {who: turned(read_classes(file, description)) for who, file in files.items()}
    volumes = {name: turned(_to_grey(read_volume(file))) for name, file in subject.images.items()}
    sizes = dict(zip(change[:, 0].astype(int).tolist(), geometry.spacing, strict=True))
    return volumes, labels, float(sizes[1] / sizes[0])


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
    places = np.flatnonzero(np.any([volume.any(axis=(1, 2)) for volume in labels], axis=0))
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


def _overlaid(grey: Grey, classes: Grey) -> Image.Image:
    base = Image.fromarray(grey).convert("RGB")
    layer = _coloured(classes).convert("RGBA")
    base.paste(layer, mask=layer.getchannel("A").point(lambda alpha: round(_OPACITY * alpha)))
    return base


def _uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
