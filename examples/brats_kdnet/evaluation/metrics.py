"""Dice and the 95th-percentile Hausdorff distance of one region in one case.

Empty regions decide more points of a published BraTS table than most methods do, so the rule is
fixed here, stated in every report, and a second convention is always computed beside it:

==================================  ======  =============================
case                                Dice    HD95
==================================  ======  =============================
both masks empty                    1       0
exactly one mask empty              0       diagonal of the image
reference empty, second convention  left out (NaN)
==================================  ======  =============================

The diagonal of a BraTS volume (240 x 240 x 155 voxels of 1 mm) is 373.13 mm, the penalty of the
BraTS evaluations of 2017 to 2019; any other grid is penalised with its own diagonal.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from monai.metrics.hausdorff_distance import compute_hausdorff_distance
from numpy.typing import NDArray

Mask = NDArray[np.bool_]


def dice(prediction: Mask, reference: Mask) -> float:
    """Overlap of two masks, 2 |A and B| / (|A| + |B|).

    Args:
        prediction: Boolean mask, any shape.
        reference: Boolean mask, the same shape.

    Returns:
        A value between 0 and 1; 1 if both masks are empty, 0 if exactly one is.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> a, b = np.array([True, True, False]), np.array([True, False, False])
        >>> round(dice(a, b), 3)
        0.667
    """
    _check_shapes(prediction, reference)
    total = int(prediction.sum()) + int(reference.sum())
    if total == 0:
        return 1.0
    return 2.0 * int(np.logical_and(prediction, reference).sum()) / total


def dice_reference_present(prediction: Mask, reference: Mask) -> float:
    """Dice under the second convention: a case whose reference is empty is left out.

    Args:
        prediction: Boolean mask, any shape.
        reference: Boolean mask, the same shape.

    Returns:
        The Dice, or NaN if the reference is empty, whatever was predicted.

    Raises:
        ValueError: If the shapes differ.
    """
    _check_shapes(prediction, reference)
    return dice(prediction, reference) if reference.any() else math.nan


def image_diagonal(shape: Sequence[int], spacing: Sequence[float]) -> float:
    """Diagonal of a volume, the HD95 of a region that only one of the two masks has.

    Args:
        shape: Voxels along each axis.
        spacing: Size of a voxel along each axis, mm (or 1 where the spacing is nominal).

    Returns:
        The diagonal in the unit of `spacing`.

    Example:
        >>> round(image_diagonal((240, 240, 155), (1.0, 1.0, 1.0)), 2)
        373.13
    """
    return math.hypot(*(n * size for n, size in zip(shape, spacing, strict=True)))


def hd95(prediction: Mask, reference: Mask, spacing: Sequence[float]) -> float:
    """95th-percentile Hausdorff distance between the surfaces of two masks, as MONAI computes it.

    The larger of the two directed 95th percentiles, between the voxels that an erosion removes;
    programs that pool both directions before taking the percentile give slightly smaller values.

    Args:
        prediction: Boolean mask, (X, Y, Z).
        reference: Boolean mask, the same shape.
        spacing: Size of a voxel along each axis, mm; ones give a distance in voxels.

    Returns:
        The distance in the unit of `spacing`: 0 if both masks are empty, the diagonal of the
        image if exactly one is.

    Raises:
        ValueError: If the shapes differ.
    """
    _check_shapes(prediction, reference)
    present = bool(prediction.any()), bool(reference.any())
    if present == (False, False):
        return 0.0
    if present != (True, True):
        return image_diagonal(prediction.shape, spacing)
    with warnings.catch_warnings():
        # MONAI 1.6 calls its own deprecated argument; nothing a caller could change.
        warnings.filterwarnings("ignore", ".*always_return_as_numpy", FutureWarning)
        distance = compute_hausdorff_distance(
            torch.from_numpy(prediction)[None, None],
            torch.from_numpy(reference)[None, None],
            include_background=True,
            percentile=95,
            spacing=tuple(float(size) for size in spacing),
        )
    return float(distance)


def _check_shapes(prediction: Mask, reference: Mask) -> None:
    if prediction.shape != reference.shape:
        raise ValueError(
            f"The prediction has shape {prediction.shape} and the reference {reference.shape}; "
            "bring both to the same grid before they are compared."
        )
