"""What a training sample is: a whole subject, a patch of one, or a slice of one.

A third of the patches lies on tumour, as in nnU-Net (Isensee et al. 2021, Nature Methods 18, "patch
sampling"); the others lie anywhere. Departures: a patch never reaches beyond the volume, unless the
volume is smaller, and the third holds on average, not in every batch.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from kdnet.config import DataConfig
from kdnet.data.description import Size
from kdnet.data.preprocessing import Sample
from kdnet.errors import UserError

Plane = Literal["axial", "coronal", "sagittal"]

#: Axis that each plane cuts across, in volumes whose axes run sideways, front to back, upwards, as
#: in BraTS (LPS) and in RAS.
AXES: dict[str, int] = {"sagittal": 0, "coronal": 1, "axial": 2}
#: One patch in so many lies on tumour, also of those of a validation subject.
TUMOUR_EVERY = 3


def samples_of(
    subjects: Dataset[Sample], data: DataConfig, seed: int, *, training: bool
) -> Dataset[Sample]:
    """Return the samples of training, or those of validation: the same in every epoch."""
    if data.patch is not None:
        if training and not data.patches_per_case:
            return FreePatches(subjects, data.patch)
        count = data.patches_per_case if training else TUMOUR_EVERY
        return FixedPatches(subjects, data.patch, count, seed)
    if data.slices is not None:
        return SliceDataset(subjects, data.slices, data.empty_slices if training else 1.0)
    return subjects


def samples_per_subject(data: DataConfig, grid: Size | None) -> int:
    """Return about how many samples an epoch takes from a subject."""
    if data.slices is not None and grid is not None:
        return grid[AXES[data.slices]]
    return data.patches_per_case or 1


def moves(data: DataConfig) -> bool:
    """Say whether training samples lie elsewhere in every epoch."""
    return data.patch is not None and not data.patches_per_case


def comes_back(data: DataConfig) -> bool:
    """Say whether training samples are seen again, so that a teacher's answer may be kept."""
    return not moves(data) and not data.augment


def plane_remark(data: DataConfig, orientation: str) -> str | None:
    """Say that slices are not those that their name means, if so."""
    across = {"sagittal": "LR", "coronal": "AP", "axial": "SI"}
    if data.slices is None or orientation[AXES[data.slices]] in across[data.slices]:
        return None
    return (
        f"--slices {data.slices} cuts across axis {AXES[data.slices] + 1} of volumes whose axes "
        f"are {orientation}: the slices are not {data.slices} ones. That is no error, but another "
        "plane or another orientation may be what you want."
    )


@dataclass(eq=False)
class FixedPatches(Dataset[Sample]):
    """The same patches of every subject in every epoch, named `<case>/patch<index>@<where>`."""

    samples: Dataset[Sample]
    patch: Size
    per_case: int
    seed: int

    def __len__(self) -> int:
        return len(self.samples) * self.per_case  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Sample:
        case, number = divmod(index, self.per_case)
        sample = self.samples[case]
        text = f"{self.seed}:{sample['name']}:{number}"
        digest = hashlib.sha256(text.encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        start = _choose_start(sample, self.patch, generator, on_tumour=number % TUMOUR_EVERY == 0)
        where = ",".join(map(str, start)) + "+" + "x".join(map(str, self.patch))
        name = f"{sample['name']}/patch{number}@{where}"
        return _part(sample, name, lambda volume: _window(volume, start, self.patch))


@dataclass(eq=False)
class FreePatches(Dataset[Sample]):
    """One patch of every subject, at a new position in every epoch."""

    samples: Dataset[Sample]
    patch: Size

    def __len__(self) -> int:
        return len(self.samples)  # type: ignore[arg-type]

    def __getitem__(self, address: tuple[int, int]) -> Sample:
        """Return the patch of a subject that a random number stands for."""
        index, number = address
        sample = self.samples[index]
        generator = torch.Generator().manual_seed(number)
        on_tumour = _draw(TUMOUR_EVERY, generator) == 0
        start = _choose_start(sample, self.patch, generator, on_tumour=on_tumour)
        return _part(sample, sample["name"], lambda volume: _window(volume, start, self.patch))


class SliceDataset(Dataset[Sample]):
    """One sample per slice that holds brain, named `<case>/<plane><index>`."""

    def __init__(self, samples: Dataset[Sample], plane: Plane, empty_slices: float = 1.0) -> None:
        self.samples = samples
        self.plane = plane
        count: int = len(samples)  # type: ignore[arg-type]
        self.addresses = [
            (case, position)
            for case in range(count)
            for position in _useful_slices(samples[case], plane, empty_slices)
        ]
        if not self.addresses:
            raise UserError(
                f"--slices {plane}: none of the {count} subjects has a slice with "
                f"{'brain' if empty_slices == 1 else 'tumour'} in it. Try --empty-slices 1."
            )

    def __len__(self) -> int:
        return len(self.addresses)

    def __getitem__(self, index: int) -> Sample:
        case, position = self.addresses[index]
        sample = self.samples[case]
        name = f"{sample['name']}/{self.plane}{position}"
        return _part(sample, name, lambda volume: volume.select(AXES[self.plane] - 3, position))


def plane_of(size: Sequence[int], plane: Plane) -> tuple[int, ...]:
    """Return the size of a slice."""
    return tuple(n for axis, n in enumerate(size) if axis != AXES[plane])


def _useful_slices(sample: Sample, plane: Plane, empty_slices: float) -> list[int]:
    """The slices of a subject that are worth training on."""
    axis = AXES[plane] - 3
    brain = [bool(part.any()) for part in sample["image"].unbind(axis)]
    label = sample.get("label")
    tumour = brain if label is None else [bool(part.any()) for part in label.unbind(axis)]
    chosen, empty = [], 0
    for position, (has_brain, has_tumour) in enumerate(zip(brain, tumour, strict=True)):
        if has_brain and not has_tumour:
            empty += 1
        # Of every n slices without tumour, floor(n * share) are kept.
        kept = int(empty * empty_slices) > int((empty - 1) * empty_slices)
        if has_brain and (has_tumour or kept):
            chosen.append(position)
    return chosen


def _choose_start(
    sample: Sample, patch: Size, generator: torch.Generator, *, on_tumour: bool
) -> list[int]:
    last = [max(n - width, 0) for n, width in zip(sample["image"].shape[1:], patch, strict=True)]
    label = sample.get("label")
    centre = _tumour_voxel(label, generator) if on_tumour and label is not None else None
    if centre is None:
        return [_draw(end + 1, generator) for end in last]
    corner = [at - width // 2 for at, width in zip(centre, patch, strict=True)]
    return [min(max(at, 0), end) for at, end in zip(corner, last, strict=True)]


def _tumour_voxel(label: Tensor, generator: torch.Generator) -> list[int] | None:
    """A voxel of a class that is drawn first, so that small classes count as much as large."""
    classes = [value for value in label.flatten().bincount().nonzero()[:, 0].tolist() if value]
    if not classes:
        return None
    chosen = classes[_draw(len(classes), generator)]
    places = (label[0] == chosen).flatten().nonzero()[:, 0]
    voxel = places[_draw(len(places), generator)]
    return [int(n) for n in torch.unravel_index(voxel, label.shape[1:])]


def _draw(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))


def _part(sample: Sample, name: str, cut: Callable[[Tensor], Tensor]) -> Sample:
    part = Sample(image=cut(sample["image"]), name=name)
    if "label" in sample:
        part["label"] = cut(sample["label"])
    return part


def _window(volume: Tensor, start: Sequence[int], patch: Size) -> Tensor:
    """A window of a volume, with zeros, which are background, where the volume ends."""
    inside = tuple(slice(at, at + n) for at, n in zip(start, patch, strict=True))
    part = volume[(slice(None), *inside)]
    missing = [n - found for n, found in zip(patch, part.shape[1:], strict=True)]
    pads = [side for gap in reversed(missing) for side in (gap // 2, gap - gap // 2)]
    return F.pad(part, pads) if any(missing) else part.clone()
