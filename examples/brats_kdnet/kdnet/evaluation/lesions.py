"""Scores of single lesions.

A case with one large and one missed small lesion has a Dice near 1. Lesion by lesion it does not.
The BraTS evaluations have counted lesions since 2023.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from kdnet.data.description import Description
from kdnet.data.preprocessing import read_classes
from kdnet.data.subjects import SEGMENTATION, ImageFile, Subject
from kdnet.data.volumes import read_geometry
from kdnet.errors import UserError
from kdnet.evaluation.metrics import Mask, surface_scores
from kdnet.evaluation.scoring import distance_unit, region_masks


def score_lesions(
    predicted: NDArray[np.integer],
    reference: NDArray[np.integer],
    description: Description,
    *,
    spacing: Sequence[float],
    **place: Any,
) -> list[dict[str, Any]]:
    """Score the lesions of every region of one case in native space, a line of a table each."""
    # Source: The pairing is that of the BraTS evaluation of 2026 (largest bipartite matching on
    # Dice); what a missed or false lesion costs, and an empty case, is that of 2023. Departures:
    # the penalty is the diagonal (373.13 mm in BraTS) where they print 373 or 374, lesions are not
    # dilated before they are told apart, and small ones are not left out.
    scores = []
    masks, voxel, diagonal = region_masks(predicted, reference, description, spacing)
    for region, mask, truth in masks:
        found, true = _numbered(mask), _numbered(truth)
        pairs = _pairs(found, true)
        lesions = int(found.max(initial=0) + true.max(initial=0)) - len(pairs)
        distances = [surface_scores(found == i, true == j, voxel)[0] for i, j, _ in pairs]
        penalty = (lesions - len(pairs)) * diagonal
        scores.append(
            place
            | {
                "region": region,
                "reference_lesions": int(true.max(initial=0)),
                "predicted_lesions": int(found.max(initial=0)),
                "matched": len(pairs),
                # Missed and false lesions count 0 and the diagonal; no lesion at all 1 and 0.
                "dice": sum(dice for *_, dice in pairs) / lesions if lesions else 1.0,
                "hd95": (sum(distances) + penalty) / lesions if lesions else 0.0,
                "hd95_unit": distance_unit(description),
            }
        )
    return scores


def score_folder(
    predictions: Path, subjects: Iterable[Subject], description: Description, **place: Any
) -> pd.DataFrame:
    """Score the lesions of label maps that `evaluate` wrote."""
    scores: list[dict[str, Any]] = []
    for subject in subjects:
        path = predictions / f"{subject.name}_seg.nii.gz"
        if not path.is_file():
            raise UserError(
                f"Lesions: expected {path}, found none. Label maps are written by a run with "
                "--predictions true."
            )
        reference = subject.files[SEGMENTATION]
        scores += score_lesions(
            read_classes(ImageFile(path), description),
            read_classes(reference, description),
            description,
            spacing=read_geometry(reference).spacing,
            **place,
            case=subject.name,
        )
    return pd.DataFrame(scores)


def _numbered(mask: Mask) -> NDArray[np.int32]:
    """Lesions by number, from 1; voxels that touch at a corner belong together."""
    numbered: NDArray[np.int32] = ndimage.label(mask, structure=np.ones((3,) * mask.ndim))[0]
    return numbered


def _pairs(found: NDArray[np.int32], true: NDArray[np.int32]) -> list[tuple[int, int, float]]:
    """Numbers of the lesions that belong together, with their Dice, whose sum is the largest."""
    shared = np.zeros((found.max(initial=0) + 1, true.max(initial=0) + 1))
    np.add.at(shared, (found.ravel(), true.ravel()), 1)
    sizes = shared.sum(axis=1, keepdims=True)[1:] + shared.sum(axis=0, keepdims=True)[:, 1:]
    overlaps = 2 * shared[1:, 1:] / sizes
    matched = zip(*linear_sum_assignment(overlaps, maximize=True), strict=True)
    return [(i + 1, j + 1, float(overlaps[i, j])) for i, j in matched if overlaps[i, j] > 0]
