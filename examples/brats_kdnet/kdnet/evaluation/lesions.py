"""Scores of single lesions, computed by panoptica; optional.

A case with one large and one missed small lesion has a Dice near 1. Lesion by lesion it does not.
The BraTS evaluations have counted lesions since 2023.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from kdnet.data.description import Description
from kdnet.data.preprocessing import read_classes
from kdnet.data.subjects import ImageFile, Subject
from kdnet.data.targets import to_regions
from kdnet.data.volumes import read_geometry
from kdnet.errors import UserError
from kdnet.evaluation.metrics import bounding_box, check_shapes, image_diagonal


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
    check_shapes(predicted, reference)
    nominal = description.spacing == "nominal"
    steps = (1.0,) * predicted.ndim if nominal else tuple(map(float, spacing))
    tumour = bounding_box((predicted > 0) | (reference > 0), margin=1)
    references = to_regions(reference[tumour], description)
    scores = []
    for region, mask in to_regions(predicted[tumour], description).items():
        found = _matched(mask, references[region], steps)
        lesions = found.reference + found.predicted - found.pairs
        penalty = (lesions - found.pairs) * image_diagonal(predicted.shape, steps)
        scores.append(
            place
            | {
                "region": region,
                "reference_lesions": found.reference,
                "predicted_lesions": found.predicted,
                "matched": found.pairs,
                # Missed and false lesions count 0 and the diagonal; no lesion at all 1 and 0.
                "dice": found.dice / lesions if lesions else 1.0,
                "hd95": (found.hd95 + penalty) / lesions if lesions else 0.0,
                "hd95_unit": "voxel" if nominal else "mm",
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
        if subject.segmentation is None or not path.is_file():
            missing = path if subject.segmentation else f"a segmentation of {subject.name}"
            raise UserError(
                f"Lesions: expected {missing}, found none. Label maps are written by a run with "
                "--predictions true."
            )
        scores += score_lesions(
            read_classes(ImageFile(path), description),
            read_classes(subject.segmentation, description),
            description,
            spacing=read_geometry(subject.segmentation).spacing,
            **place,
            case=subject.name,
        )
    return pd.DataFrame(scores)


@dataclass(frozen=True)
class _Matched:
    """Counts, and sums over the pairs."""

    reference: int
    predicted: int
    pairs: int
    dice: float
    hd95: float


def _matched(
    predicted: NDArray[np.bool_], reference: NDArray[np.bool_], spacing: tuple[float, ...]
) -> _Matched:
    panoptica = load_panoptica()
    if not (predicted.any() or reference.any()):
        return _Matched(0, 0, 0, dice=0.0, hd95=0.0)
    results = _evaluator().evaluate(
        predicted.astype(np.uint8), reference.astype(np.uint8), False, voxelspacing=spacing
    )
    (result,) = results.values()
    sums = {
        metric: math.fsum(
            result.get_list_metric(getattr(panoptica.Metric, metric), panoptica.MetricMode.ALL)
        )
        for metric in ("DSC", "HD95")
    }
    counts = int(result.n_ref_instances), int(result.n_pred_instances), int(result.tp)
    return _Matched(*counts, dice=sums["DSC"], hd95=sums["HD95"])


@lru_cache(maxsize=1)
def _evaluator() -> Any:
    panoptica = load_panoptica()
    edges = importlib.import_module("panoptica.utils.edge_case_handling")
    metrics = [panoptica.Metric.DSC, panoptica.Metric.HD95]
    # What to say where nothing is matched is decided by the caller, from the counts.
    unmatched = edges.MetricZeroTPEdgeCaseHandling(default_result=edges.EdgeCaseResult.NAN)
    return panoptica.Panoptica_Evaluator(
        expected_input=panoptica.InputType.SEMANTIC,
        instance_approximator=panoptica.ConnectedComponentsInstanceApproximator(),
        # Any overlap makes a pair.
        instance_matcher=panoptica.MaxBipartiteMatching(panoptica.Metric.DSC, 1e-6),
        edge_case_handler=edges.EdgeCaseHandler(dict.fromkeys(metrics, unmatched)),
        instance_metrics=metrics,
        global_metrics=[],
    )


def load_panoptica() -> Any:
    """Import panoptica."""
    try:
        panoptica = importlib.import_module("panoptica")
    except ImportError as error:
        raise UserError(
            f"Scores of single lesions are computed by panoptica, which cannot be imported "
            f"({error}). Install what it needs, and then itself without its upper bounds on numpy "
            "and rich: pip install -e '.[lesions]' and pip install --no-deps 'panoptica>=2.1.7'. "
            "No other score needs it."
        ) from error
    panoptica.disable_citation_reminder()
    return panoptica
