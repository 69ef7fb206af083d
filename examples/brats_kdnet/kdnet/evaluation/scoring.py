"""Scores of one network on held-out cases, and the one long table that keeps them: scores.csv."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor

from kdnet.data.description import Description
from kdnet.data.preprocessing import Preprocessing, read_classes
from kdnet.data.subjects import SEGMENTATION, Subject
from kdnet.data.targets import predict_classes
from kdnet.data.volumes import read_geometry
from kdnet.errors import UserError
from kdnet.evaluation.inference import native_classes, predict_finite, write_label_map
from kdnet.evaluation.metrics import Mask, bounding_box, dice, image_diagonal, surface_scores
from kdnet.evaluation.postprocessing import remove_small
from kdnet.files import UnreadableError, atomic, read_rows

#: What only one line of a table may have.
PLACE = ("row", "fold", "seed", "case", "region", "space", "postprocessing", "modalities")
#: Columns and what they hold: a name, perhaps none, a count, a number from 0, one up to 1, or one
#: of some words. Numbers that do not exist are empty.
COLUMNS: dict[str, str | tuple[str, ...]] = {
    "row": "name",
    "fold": "count",
    "seed": "count",
    "labelled": "count",
    "unlabelled": "count",
    "against": "text",
    "case": "name",
    "region": "name",
    "space": ("native", "grid"),  # the original volume, or the resampled grid of the training
    "postprocessing": ("off", "on"),  # on: small predictions removed, see postprocessing.py
    "modalities": "text",  # what the network saw, such as flair+t1
    "dice": "share",
    "dice_reference_present": "share",  # empty if the reference is
    "hd95": "number",
    "hd95_unit": ("mm", "voxel"),  # voxel where the spacing in the files is nominal
    "nsd": "share",  # surface Dice at 1 mm; empty where the spacing is nominal
    "reference_voxels": "count",
    "predicted_voxels": "count",
}


def score_case(
    predicted: NDArray[np.integer],
    reference: NDArray[np.integer],
    description: Description,
    *,
    spacing: Sequence[float],
    **place: Any,
) -> list[dict[str, Any]]:
    """Score every region of one case, a line of the table each; `place` says whose they are."""
    scores = []
    masks, voxel, diagonal = region_masks(predicted, reference, description, spacing)
    for region, mask, truth in masks:
        distance, surface = surface_scores(mask, truth, voxel, diagonal=diagonal)
        overlap, present = dice(mask, truth), int(truth.sum())
        unit = distance_unit(description)
        scores.append(
            place
            | {
                "region": region,
                "dice": overlap,
                "dice_reference_present": overlap if present else math.nan,
                "hd95": distance,
                "hd95_unit": unit,
                "nsd": surface if unit == "mm" else math.nan,
                "reference_voxels": present,
                "predicted_voxels": int(mask.sum()),
            }
        )
    return scores


def region_masks(
    predicted: NDArray[np.integer],
    reference: NDArray[np.integer],
    description: Description,
    spacing: Sequence[float],
) -> tuple[list[tuple[str, Mask, Mask]], tuple[float, ...], float]:
    """Name, prediction and reference of every region, size of a voxel, and the image's diagonal."""
    if predicted.shape != reference.shape:
        raise UserError(
            f"The prediction has shape {predicted.shape} and the reference {reference.shape}; "
            "bring both to the same grid before they are compared."
        )
    nominal = distance_unit(description) == "voxel"
    voxel = (1.0,) * predicted.ndim if nominal else tuple(map(float, spacing))
    # Every region lies inside; a full volume holds twenty times as much.
    tumour = bounding_box((predicted > 0) | (reference > 0))
    found, true = predicted[tumour], reference[tumour]
    masks = [
        (region, np.isin(found, indices), np.isin(true, indices))
        for region, indices in description.regions.items()
    ]
    return masks, voxel, image_diagonal(predicted.shape, voxel)


def distance_unit(description: Description) -> str:
    """What distances are given in: voxels where the spacing in the files is nominal."""
    return "voxel" if description.spacing == "nominal" else "mm"


def grid_spacing(
    preprocessing: Preprocessing, shape: Sequence[int], spacing: Sequence[float]
) -> tuple[float, ...]:
    """Voxel size of the training grid of one case."""
    extent = preprocessing.crop or tuple(shape)
    sizes = zip(extent, preprocessing.grid or extent, spacing, strict=True)
    return tuple(float(step) * n / cells for n, cells, step in sizes)


def evaluate(
    network_predict: Callable[[Tensor], Tensor],
    subjects: Iterable[Subject],
    preprocessing: Preprocessing,
    activation: str,
    *,
    unit: Mapping[str, Any],
    smallest_volume: float | None = None,
    prediction_folder: Path | None = None,
) -> pd.DataFrame:
    """Predict and score held-out subjects, at the training grid and in native space."""
    place, description = {**unit}, preprocessing.description
    scores: list[dict[str, Any]] = []
    for subject in subjects:
        place["case"] = subject.name
        sample = preprocessing(subject)
        logits = predict_finite(network_predict, sample["image"], subject.name)
        on_grid = predict_classes(logits, description, activation)[0].numpy()
        file = subject.files[SEGMENTATION]
        reference, geometry = read_classes(file, description), read_geometry(file)
        predicted = native_classes(logits, geometry.shape, preprocessing, activation)
        cells = grid_spacing(preprocessing, geometry.shape, geometry.spacing)
        label = sample["label"][0].numpy()
        here = place | {"space": "grid", "postprocessing": "off", "spacing": cells}
        scores += score_case(on_grid, label, description, **here)
        here |= {"space": "native", "spacing": geometry.spacing}
        # Without a grid and a crop both spaces are one; whole volumes are not compared twice.
        if preprocessing.grid is None and preprocessing.crop is None:
            scores += [{**s, "space": "native"} for s in scores[-len(description.regions) :]]
        else:
            scores += score_case(predicted, reference, description, **here)
        if smallest_volume is not None:
            cleaned = remove_small(predicted, description, geometry.spacing, smallest_volume)
            here["postprocessing"] = "on"
            scores += score_case(cleaned, reference, description, **here)
        if prediction_folder is not None:
            path = prediction_folder / f"{subject.name}_seg.nii.gz"
            write_label_map(path, predicted, geometry, description)
    return pd.DataFrame(scores, columns=[*COLUMNS])


def write_scores(path: Path, scores: pd.DataFrame) -> None:
    """Write a table of scores."""
    with atomic(path) as incomplete:
        scores.to_csv(incomplete, index=False, lineterminator="\n", encoding="utf-8")


def read_scores(path: Path) -> pd.DataFrame:
    """Read what `write_scores` wrote, or what a stranger made of it."""
    return read_table(path, COLUMNS, PLACE)


def gather_scores(root: Path, name: str = "scores.csv") -> pd.DataFrame:
    """Put the tables of all units of a plan into one at its root."""
    parts = [read_scores(path) for path in sorted((root / "units").glob(f"*/*/{name}"))]
    if not parts:
        return pd.DataFrame(columns=[*COLUMNS])
    scores = pd.concat(parts, ignore_index=True)
    write_scores(root / name, scores)
    return scores


def scored_in(
    scores: pd.DataFrame, space: str = "native", postprocessing: str = "off"
) -> pd.DataFrame:
    """Lines of one space and treatment."""
    return scores[(scores["space"] == space) & (scores["postprocessing"] == postprocessing)]


def read_table(
    path: Path, columns: Mapping[str, str | tuple[str, ...]], place: Sequence[str]
) -> pd.DataFrame:
    """Read a CSV file of known columns, of which no two lines may be about the same."""
    if not path.is_file():
        raise UserError(f"{path}: expected a table of scores, found no such file.")
    try:
        frame = pd.DataFrame(read_rows(path, [*columns]), columns=[*columns], dtype=object)
        for name, form in columns.items():
            frame[name] = _column(frame[name], form)
    except (UnreadableError, ValueError, OverflowError) as error:
        raise UserError(
            f"{path}: expected the columns {', '.join(columns)}; {error}. Restore the file from a "
            "copy, or make it again."
        ) from error
    if frame.empty:
        raise UserError(f"{path}: expected at least one line of scores, found none.")
    twice = frame.duplicated([*place])
    if twice.any():
        where = ", ".join(f"{name} {frame[name][twice.idxmax()]}" for name in place)
        raise UserError(f"{path}: two lines are about {where}. Remove one of them.")
    return frame


def _column(texts: "pd.Series[Any]", form: str | tuple[str, ...]) -> "pd.Series[Any]":
    """Texts as what they stand for; the first that is none of it is an error."""
    values = texts
    if form in {"count", "share", "number"}:
        values = texts.map(_number).astype(float)
        most = {"share": 1.0, "count": 2.0**53}.get(str(form), float(np.finfo(float).max))
        # Scores that do not exist are empty; counts always exist, and are whole.
        missing = texts.str.lower().isin(["", "nan"]) & (form != "count")
        right = values.between(0, most) & ((values % 1 == 0) | (form != "count")) | missing
    elif isinstance(form, tuple):
        right = texts.isin(form)
    else:
        right = (texts.str.strip() != "") | (form == "text")
    if not right.all():
        line = int((~right).to_numpy().argmax())
        raise ValueError(f"line {line + 2}: {texts.name} is {texts.iloc[line]!r}, no {form}")
    return values.astype(int) if form == "count" else values


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
