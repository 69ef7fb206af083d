"""Scores of one network on held-out cases, at the training grid and in native space."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdnet.data.description import Description
from kdnet.data.layouts import Subject
from kdnet.data.preprocessing import Preprocessing
from kdnet.data.targets import predict_classes, to_regions
from kdnet.errors import UserError
from kdnet.evaluation.label_maps import write_label_map
from kdnet.evaluation.metrics import (
    bounding_box,
    check_shapes,
    dice,
    dice_reference_present,
    image_diagonal,
    surface_scores,
)
from kdnet.evaluation.postprocessing import remove_small
from kdnet.files import UnreadableError, atomic, read_rows

Space = Literal["grid", "native"]
Postprocessing = Literal["off", "on"]


@dataclass(frozen=True)
class Score:
    """What one network reached in one region of one case.

    Attributes:
        role: Name of the network, such as "teacher", "baseline" or "student".
        case: Name of the subject.
        region: Name of the region, such as "ET".
        space: "grid" for the resampled training grid, "native" for the original volume.
        dice: Dice; 1 if reference and prediction are both empty, 0 if one of them is.
        dice_reference_present: The same, NaN if the reference is empty.
        hd95: 95th-percentile Hausdorff distance in `hd95_unit`; 0 if both are empty, the diagonal
            of the image if one of them is.
        hd95_unit: "mm", or "voxel" where the spacing in the files is nominal.
        reference_voxels: Size of the region in the reference.
        predicted_voxels: Size of the region in the prediction.
        nsd: Surface Dice at 1 mm; 1 if both are empty, 0 if one of them is; NaN where the spacing
            is nominal.
        postprocessing: Whether small predictions were removed, see `postprocessing.py`.
        modalities: What the network saw, joined by plus signs, such as "t1ce" or "flair+t1";
            empty if that was not recorded.
        fold: Index of the fold whose held-out cases are scored.
        seed: Seed of the training.
    """

    role: str
    case: str
    region: str
    space: Space
    dice: float
    dice_reference_present: float
    hd95: float
    hd95_unit: str
    reference_voxels: int
    predicted_voxels: int
    nsd: float = math.nan
    postprocessing: Postprocessing = "off"
    modalities: str = ""
    fold: int = 0
    seed: int = 0


def score_case(
    predicted: NDArray[np.integer],
    reference: NDArray[np.integer],
    description: Description,
    *,
    role: str,
    case: str,
    space: Space,
    spacing: Sequence[float],
    postprocessing: Postprocessing = "off",
    modalities: str = "",
    fold: int = 0,
    seed: int = 0,
) -> list[Score]:
    """Score every region of one case."""
    check_shapes(predicted, reference)
    nominal = description.spacing == "nominal"
    steps = (1.0,) * predicted.ndim if nominal else tuple(spacing)
    diagonal = image_diagonal(predicted.shape, steps)
    # Every region lies inside; a full volume holds twenty times as much.
    tumour = bounding_box((predicted > 0) | (reference > 0), margin=1)
    regions = to_regions(reference[tumour], description)
    scores = []
    for region, mask in to_regions(predicted[tumour], description).items():
        distance, surface = surface_scores(mask, regions[region], steps, diagonal=diagonal)
        scores.append(
            Score(
                role=role,
                case=case,
                region=region,
                space=space,
                dice=dice(mask, regions[region]),
                dice_reference_present=dice_reference_present(mask, regions[region]),
                hd95=distance,
                hd95_unit="voxel" if nominal else "mm",
                reference_voxels=int(regions[region].sum()),
                predicted_voxels=int(mask.sum()),
                nsd=math.nan if nominal else surface,
                postprocessing=postprocessing,
                modalities=modalities,
                fold=fold,
                seed=seed,
            )
        )
    return scores


def grid_spacing(
    preprocessing: Preprocessing, shape: Sequence[int], spacing: Sequence[float]
) -> tuple[float, ...]:
    """Voxel size of the training grid of one case."""
    extent = preprocessing.crop or tuple(shape)
    sizes = zip(extent, preprocessing.grid or extent, spacing, strict=True)
    return tuple(float(step) * n / cells for n, cells, step in sizes)


def native_classes(
    logits: Tensor,
    shape: tuple[int, int, int],
    preprocessing: Preprocessing,
    description: Description,
    activation: str,
) -> NDArray[np.integer]:
    """Class indices on the original grid from the logits of the training grid."""
    softmax = activation == "softmax"
    probabilities = logits.softmax(dim=1) if softmax else logits.sigmoid()
    native = preprocessing.to_native(
        probabilities[0].float(), shape, outside=1.0 if softmax else 0.0
    )
    # `predict_classes` cuts at a logit of zero, which is a probability of one half; the argmax of
    # exclusive classes does not notice the shift.
    return predict_classes(native[None] - 0.5, description, activation)[0].numpy()


def evaluate(
    network_predict: Callable[[Tensor], Tensor],
    subjects: Iterable[Subject],
    preprocessing: Preprocessing,
    description: Description,
    activation: str,
    *,
    role: str,
    fold: int = 0,
    seed: int = 0,
    smallest_volume: float | None = None,
    prediction_folder: Path | None = None,
    on_case: Callable[[str], None] | None = None,
) -> list[Score]:
    """Predict and score held-out subjects, at the training grid and in native space."""
    scores: list[Score] = []
    for subject in subjects:
        sample = preprocessing(subject)
        logits = predict_finite(network_predict, sample["image"], subject.name)
        on_grid = predict_classes(logits, description, activation)[0].numpy()
        native = preprocessing.native_label(subject)
        shape = cast("tuple[int, int, int]", native.classes.shape)
        predicted = native_classes(logits, shape, preprocessing, description, activation)
        compare = partial(
            score_case,
            description=description,
            role=role,
            case=subject.name,
            modalities="+".join(preprocessing.modalities),
            fold=fold,
            seed=seed,
        )
        cells = grid_spacing(preprocessing, shape, native.spacing)
        scores += compare(on_grid, sample["label"][0].numpy(), space="grid", spacing=cells)
        in_native = partial(
            compare, reference=native.classes, space="native", spacing=native.spacing
        )
        # Without a grid and a crop both spaces are one; whole volumes are not compared twice.
        one_space = preprocessing.grid is None and preprocessing.crop is None
        scores += (
            [replace(score, space="native") for score in scores[-len(description.regions) :]]
            if one_space
            else in_native(predicted)
        )
        if smallest_volume is not None:
            cleaned = remove_small(predicted, description, native.spacing, smallest_volume)
            scores += in_native(cleaned, postprocessing="on")
        if prediction_folder is not None:
            write_label_map(
                prediction_folder / f"{subject.name}_seg.nii.gz",
                predicted,
                affine=native.affine,
                header=native.header,
                export_labels=description.export_labels,
                note="phantom" if description.phantom else "",
            )
        if on_case is not None:
            on_case(subject.name)
    return scores


def predict_finite(network_predict: Callable[[Tensor], Tensor], image: Tensor, name: str) -> Tensor:
    """Run a network on one image without gradients and refuse an output that means nothing."""
    with torch.no_grad():
        logits = network_predict(image[None]).float().cpu()
    if not bool(torch.isfinite(logits).all()):
        raise UserError(
            f"{name}: expected finite network outputs, found NaN or infinity. The image may hold "
            "extreme intensities, or the training of this model diverged."
        )
    return logits


def write_scores(path: Path, scores: Iterable[Score]) -> None:
    """Write scores as CSV, one row per role, case, region and space."""
    with (
        atomic(path) as incomplete,
        incomplete.open("w", newline="", encoding="utf-8") as stream,
    ):
        writer = csv.DictWriter(stream, fieldnames=[field.name for field in fields(Score)])
        writer.writeheader()
        writer.writerows(_to_row(score) for score in scores)


def read_scores(path: Path) -> list[Score]:
    """Read what `write_scores` wrote."""
    if not path.is_file():
        raise UserError(f"{path}: expected the scores of a run, found no such file.")
    needed = [field.name for field in fields(Score) if field.default is MISSING]
    try:
        return [_from_row(row) for row in read_rows(path, needed)]
    except (UnreadableError, KeyError, TypeError, ValueError) as error:
        names = ", ".join(field.name for field in fields(Score))
        raise UserError(f"{path}: expected the columns {names}; {error!r} went wrong.") from error


def _to_row(score: Score) -> dict[str, object]:
    return {
        name: "" if isinstance(value, float) and math.isnan(value) else value
        for name, value in asdict(score).items()
    }


def _from_row(row: dict[str, str]) -> Score:
    values: dict[str, Any] = {}
    for field in fields(Score):
        if field.name in row:
            values[field.name] = _READERS[str(field.type)](row[field.name])
        elif field.default is MISSING:
            raise KeyError(field.name)
    return Score(**values)


def _number(text: str) -> float:
    return float(text) if text else math.nan


def _one_of(*allowed: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in allowed:
            raise ValueError(f"'{text}' is none of {', '.join(allowed)}")
        return text

    return read


# Annotations are text in this module.
_READERS: dict[str, Callable[[str], object]] = {
    "str": str,
    "int": int,
    "float": _number,
    "Space": _one_of("grid", "native"),
    "Postprocessing": _one_of("off", "on"),
}
