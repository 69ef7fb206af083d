"""How a volume is turned, scaled and cropped before somebody looks at it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from nibabel import orientations as nibabel_orientations
from numpy.typing import NDArray

# Rows run from the front of the head to its back, columns from the patient's right to the left,
# as radiologists look at it.
_RADIOLOGICAL = ("L", "P", "S")
_MARGIN = 4

orientations: Any = nibabel_orientations  # not typed

Window = tuple[slice, slice]


class Turn:
    """Turns volumes so that their axes run left, back, up."""

    def __init__(self, affine: NDArray[np.float64]) -> None:
        start = orientations.io_orientation(affine)
        end = orientations.axcodes2ornt(_RADIOLOGICAL)
        self._change = orientations.ornt_transform(start, end)

    def __call__(self, volume: NDArray[Any]) -> NDArray[Any]:
        """Turn one volume, (X, Y, Z)."""
        turned: NDArray[Any] = orientations.apply_orientation(volume, self._change)
        return turned

    def spacing(self, spacing: Sequence[float]) -> list[float]:
        """Return the voxel size along the new axes."""
        size = [0.0, 0.0, 0.0]
        for axis, (target, _) in enumerate(self._change):
            size[int(target)] = spacing[axis]
        return size


def to_grey(volume: NDArray[Any]) -> NDArray[np.uint8]:
    """Scale a volume to grey values, black to white."""
    volume = volume.astype(np.float32)
    inside = volume[volume != 0]
    if inside.size == 0:
        return np.zeros(volume.shape, dtype=np.uint8)
    low, high = np.percentile(inside, [1, 99.5])
    scaled = (volume - low) / max(float(high - low), 1e-6)
    grey: NDArray[np.uint8] = (np.where(volume != 0, scaled.clip(0, 1), 0) * 255).astype(np.uint8)
    return grey


def fullest_slice(labels: Sequence[NDArray[np.uint8]], depth: int) -> int:
    """Find the axial slice with most tumour."""
    for volume in labels:
        if volume.any():
            return int((volume > 0).sum(axis=(0, 1)).argmax())
    return depth // 2


def head_window(volumes: Sequence[NDArray[np.uint8]]) -> Window:
    """Find what there is to see in a stack of slices."""
    filled = np.any([volume.any(axis=2).T for volume in volumes], axis=0)
    if not filled.any():
        return slice(None), slice(None)
    bounds = []
    for axis in (1, 0):
        places = np.flatnonzero(filled.any(axis=axis))
        bounds.append(slice(max(int(places[0]) - _MARGIN, 0), int(places[-1]) + 1 + _MARGIN))
    return bounds[0], bounds[1]


def shown_slices(labels: Sequence[NDArray[np.uint8]], depth: int, limit: int) -> list[int]:
    """Choose the slices of a viewer: those with tumour, a margin, and no more than fit."""
    filled = np.zeros(depth, dtype=bool)
    for volume in labels:
        filled |= volume.any(axis=(0, 1))
    places = np.flatnonzero(filled)
    margin = max(2, depth // 20)
    first = max(int(places[0]) - margin, 0) if places.size else 0
    last = min(int(places[-1]) + margin, depth - 1) if places.size else depth - 1
    step = -(-(last - first + 1) // limit)
    # The comb is moved so that it meets the slice that the strip shows.
    start = first + (fullest_slice(labels, depth) - first) % step
    return list(range(start, last + 1, step))
