"""Slices of preprocessed subjects as the samples of two-dimensional networks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from kdnet.data.preprocessing import Sample
from kdnet.errors import UserError

Plane = Literal["axial", "coronal", "sagittal"]

#: Axis that each plane cuts across, in volumes whose axes run sideways, front to back, upwards, as
#: in BraTS (LPS) and in RAS.
AXES: dict[str, int] = {"sagittal": 0, "coronal": 1, "axial": 2}


def plane_of(size: Sequence[int], plane: Plane) -> tuple[int, ...]:
    """Return the size of a slice."""
    return tuple(n for axis, n in enumerate(size) if axis != AXES[plane])


def cut(volume: Tensor, plane: Plane) -> Iterator[Tensor]:
    """Cut a volume into its slices."""
    return iter(volume.unbind(AXES[plane] - 3))


def stack(slices: Sequence[Tensor], plane: Plane) -> Tensor:
    """Put slices together again; the inverse of `cut`."""
    return torch.stack(list(slices), AXES[plane] - 3)


@dataclass(frozen=True)
class Address:
    """Where a slice lies.

    Attributes:
        case: Index of the subject.
        position: Index of the slice.
    """

    case: int
    position: int


class SliceDataset(Dataset[Sample]):
    """One sample per slice that holds brain, named `<case>/<plane><index>`."""

    def __init__(
        self, samples: Dataset[Sample], plane: Plane, *, empty_slices: float = 1.0
    ) -> None:
        self.samples = samples
        self.plane = plane
        count: int = len(samples)  # type: ignore[arg-type]
        self.addresses = [
            Address(case, position)
            for case in range(count)
            for position in useful_slices(samples[case], plane, empty_slices)
        ]
        if not self.addresses:
            raise UserError(
                f"--slices {plane}: none of the {count} subjects has a slice with "
                f"{'brain' if empty_slices == 1 else 'tumour'} in it. Look at the images, or set "
                "--empty_slices 1."
            )

    def __len__(self) -> int:
        return len(self.addresses)

    def __getitem__(self, index: int) -> Sample:
        address = self.addresses[index]
        sample = self.samples[address.case]
        axis = AXES[self.plane] - 3
        part = Sample(
            image=sample["image"].select(axis, address.position),
            name=f"{sample['name']}/{self.plane}{address.position}",
        )
        if "label" in sample:
            part["label"] = sample["label"].select(axis, address.position)
        return part


def useful_slices(sample: Sample, plane: Plane, empty_slices: float) -> list[int]:
    """Choose the slices of a subject that are worth training on."""
    brain = [bool(part.any()) for part in cut(sample["image"], plane)]
    label = sample.get("label")
    tumour = brain if label is None else [bool(part.any()) for part in cut(label, plane)]
    chosen, empty = [], 0
    for position, (has_brain, has_tumour) in enumerate(zip(brain, tumour, strict=True)):
        if has_brain and not has_tumour:
            empty += 1
        # Of every n slices without tumour, floor(n * share) are kept.
        kept = int(empty * empty_slices) > int((empty - 1) * empty_slices)
        if has_brain and (has_tumour or kept):
            chosen.append(position)
    return chosen
