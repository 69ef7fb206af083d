"""Removal of predictions too small to be believed.

A few voxels of enhancing tumour in a case that has none turn its Dice from 1 into 0, so entries of
the BraTS challenge drop an enhancing tumour below a few hundred voxels. One such case in fifty
moves the mean by two points, which is more than most methods differ by: the main table is
therefore made without, and a second one with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from kdnet.data.description import Description

SMALLEST_VOLUME = 500.0


@dataclass(frozen=True)
class Rule:
    """What happens to small predictions in a data set.

    Attributes:
        region: The region that is looked at; None where no region lies inside another.
        classes: Its class indices.
        replacement: The class that it becomes, 0 for background.
        whole: Whether the region goes as a whole, or each of its connected components alone.
    """

    region: str | None
    classes: tuple[int, ...]
    replacement: int
    whole: bool

    def words(self, description: Description, smallest_volume: float = SMALLEST_VOLUME) -> str:
        """The rule as a sentence for a report."""
        unit = "voxels" if description.spacing == "nominal" else "mm³"
        limit = f"below {smallest_volume:g} {unit}"
        becomes = description.classes[self.replacement]
        if self.whole:
            return f"{self.region} {limit} in a whole case becomes {becomes}."
        return f"Connected tumour {limit} becomes {becomes}."


def rule_of(description: Description) -> Rule:
    """Read from a description which rule fits its regions."""
    # Source: The rule of BraTS entries since 2018; RFNet and ShaSpec publish results with it.
    regions = {name: set(indices) for name, indices in description.regions.items()}
    nested = [
        (len(inner), len(outer), name, outer - inner)
        for name, inner in regions.items()
        for outer in regions.values()
        if inner < outer
    ]
    if not nested:
        tumour = tuple(range(1, len(description.classes)))
        return Rule(None, tumour, 0, whole=False)
    # The fewest classes make the innermost region, and its nearest surrounding.
    _, _, name, rest = min(nested, key=lambda item: item[:2])
    return Rule(name, description.regions[name], min(rest), whole=True)


def remove_small(
    classes: NDArray[np.integer],
    description: Description,
    spacing: Sequence[float],
    smallest_volume: float = SMALLEST_VOLUME,
) -> NDArray[np.integer]:
    """Apply the rule of a data set to one label map."""
    if not 0 <= smallest_volume < math.inf:
        raise ValueError(f"The smallest volume must be 0 or more mm³, got {smallest_volume}.")
    voxel = 1.0 if description.spacing == "nominal" else math.prod(map(float, spacing))
    rule = rule_of(description)
    mask = np.isin(classes, rule.classes)
    small = _small(mask, smallest_volume / voxel, whole=rule.whole)
    if not small.any():
        return classes
    return np.where(small, np.array(rule.replacement, dtype=classes.dtype), classes)


def _small(mask: NDArray[np.bool_], voxels: float, *, whole: bool) -> NDArray[np.bool_]:
    """The part of a mask that has fewer voxels than given."""
    if whole:
        return mask if int(mask.sum()) < voxels else np.zeros_like(mask)
    # Voxels that touch at a corner belong together.
    components, _ = ndimage.label(mask, structure=np.ones((3,) * mask.ndim))
    sizes = np.bincount(components.ravel())
    few = sizes < voxels
    few[0] = False
    removed: NDArray[np.bool_] = few[components]
    return removed
