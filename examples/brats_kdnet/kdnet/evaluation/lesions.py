"""Scores of single lesions, computed by panoptica; optional.

A case with one large and one missed small lesion has a Dice near 1. Lesion by lesion it does not.
The BraTS evaluations have counted lesions since 2023.
"""

from __future__ import annotations

import csv
import importlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdnet.data.description import Description
from kdnet.data.layouts import ImageFile, Subject
from kdnet.data.preprocessing import read_classes
from kdnet.data.targets import to_regions
from kdnet.data.volumes import read_geometry
from kdnet.errors import UserError
from kdnet.evaluation.metrics import bounding_box, check_shapes, image_diagonal
from kdnet.files import atomic


@dataclass(frozen=True)
class LesionScore:
    """The lesions of one region in one case, in native space.

    Attributes:
        role: Name of the network.
        case: Name of the subject.
        region: Name of the region.
        reference_lesions: Connected components of the reference.
        predicted_lesions: Connected components of the prediction.
        matched: Pairs of a reference and a predicted lesion.
        dice: Sum of the Dice of the pairs, divided by pairs, missed and false lesions together;
            1 if there is no lesion at all.
        hd95: Mean HD95 of the pairs, missed and false lesions, which count the diagonal of the
            image; 0 if there is no lesion at all.
        hd95_unit: "mm", or "voxel" where the spacing in the files is nominal.
        modalities: What the network saw.
        fold: Index of the fold.
        seed: Seed of the training.
    """

    role: str
    case: str
    region: str
    reference_lesions: int
    predicted_lesions: int
    matched: int
    dice: float
    hd95: float
    hd95_unit: str
    modalities: str = ""
    fold: int = 0
    seed: int = 0


def score_lesions(
    predicted: NDArray[np.integer],
    reference: NDArray[np.integer],
    description: Description,
    *,
    role: str,
    case: str,
    spacing: Sequence[float],
    modalities: str = "",
    fold: int = 0,
    seed: int = 0,
) -> list[LesionScore]:
    """Score the lesions of every region of one case."""
    # Source: The pairing is that of the BraTS evaluation of 2026 (largest bipartite matching on
    # Dice); what a missed or false lesion costs, and an empty case, is that of 2023. Departures:
    # the penalty is the diagonal (373.13 mm in BraTS) where they print 373 or 374, lesions are not
    # dilated before they are told apart, and small ones are not left out.
    check_shapes(predicted, reference)
    nominal = description.spacing == "nominal"
    steps = (1.0,) * predicted.ndim if nominal else tuple(map(float, spacing))
    tumour = bounding_box((predicted > 0) | (reference > 0), margin=1)
    regions = to_regions(reference[tumour], description)
    scores = []
    for region, mask in to_regions(predicted[tumour], description).items():
        found = _matched(mask, regions[region], steps)
        lesions = found.reference + found.predicted - found.pairs
        unmatched = lesions - found.pairs
        penalty = unmatched * image_diagonal(predicted.shape, steps)
        scores.append(
            LesionScore(
                role=role,
                case=case,
                region=region,
                reference_lesions=found.reference,
                predicted_lesions=found.predicted,
                matched=found.pairs,
                dice=found.dice / lesions if lesions else 1.0,
                hd95=(found.hd95 + penalty) / lesions if lesions else 0.0,
                hd95_unit="voxel" if nominal else "mm",
                modalities=modalities,
                fold=fold,
                seed=seed,
            )
        )
    return scores


def score_folder(
    predictions: Path,
    subjects: Iterable[Subject],
    description: Description,
    *,
    role: str,
    modalities: str = "",
    fold: int = 0,
    seed: int = 0,
) -> list[LesionScore]:
    """Score the lesions of label maps that `evaluate` wrote."""
    scores: list[LesionScore] = []
    for subject in subjects:
        path = predictions / f"{subject.name}_seg.nii.gz"
        if subject.segmentation is None or not path.is_file():
            missing = path if subject.segmentation else f"a segmentation of {subject.name}"
            raise UserError(
                f"Lesions of {role}: expected {missing}, found none. Label maps are written by a "
                "run with --predictions true."
            )
        scores += score_lesions(
            read_classes(ImageFile(path), description),
            read_classes(subject.segmentation, description),
            description,
            role=role,
            case=subject.name,
            spacing=read_geometry(subject.segmentation).spacing,
            modalities=modalities,
            fold=fold,
            seed=seed,
        )
    return scores


def write_lesions(path: Path, scores: Iterable[LesionScore]) -> None:
    """Write scores as CSV, one row per role, case and region."""
    with atomic(path) as partial, partial.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [field.name for field in fields(LesionScore)])
        writer.writeheader()
        writer.writerows(asdict(score) for score in scores)


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
