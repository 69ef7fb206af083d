"""Patches of subjects that keep their own size, as the samples of three-dimensional networks.

A third of them lies on tumour, as in nnU-Net (Isensee et al. 2021, Nature Methods 18, "patch
sampling"); the others lie anywhere. Departures: a patch never reaches beyond the volume, unless the
volume is smaller, and the third holds on average, not in every batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from kdnet.data.description import Size
from kdnet.data.preprocessing import Sample

#: One patch in so many lies on tumour.
TUMOUR_EVERY = 3


class FixedPatches(Dataset[Sample]):
    """The same patches of every subject in every epoch, named `<case>/patch<index>@<where>`."""

    def __init__(self, samples: Dataset[Sample], patch: Size, per_case: int, seed: int) -> None:
        self.samples = samples
        self.patch = patch
        self.per_case = per_case
        self.seed = seed

    def __len__(self) -> int:
        return len(self.samples) * self.per_case  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Sample:
        case, number = divmod(index, self.per_case)
        sample = self.samples[case]
        text = f"{self.seed}:{sample['name']}:{number}"
        digest = hashlib.sha256(text.encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        start = choose_start(sample, self.patch, generator, on_tumour=number % TUMOUR_EVERY == 0)
        where = ",".join(map(str, start)) + "+" + "x".join(map(str, self.patch))
        return cut_patch(sample, f"{sample['name']}/patch{number}@{where}", start, self.patch)


class FreePatches(Dataset[Sample]):
    """One patch of every subject, at a new position in every epoch."""

    def __init__(self, samples: Dataset[Sample], patch: Size) -> None:
        self.samples = samples
        self.patch = patch

    def __len__(self) -> int:
        return len(self.samples)  # type: ignore[arg-type]

    def __getitem__(self, address: tuple[int, int]) -> Sample:
        """Return a patch."""
        index, number = address
        sample = self.samples[index]
        generator = torch.Generator().manual_seed(number)
        on_tumour = draw(TUMOUR_EVERY, generator) == 0
        start = choose_start(sample, self.patch, generator, on_tumour=on_tumour)
        return cut_patch(sample, sample["name"], start, self.patch)


def choose_start(
    sample: Sample, patch: Size, generator: torch.Generator, *, on_tumour: bool
) -> list[int]:
    """Choose where a patch begins."""
    last = [max(n - width, 0) for n, width in zip(sample["image"].shape[1:], patch, strict=True)]
    label = sample.get("label")
    centre = tumour_voxel(label, generator) if on_tumour and label is not None else None
    if centre is None:
        return [draw(end + 1, generator) for end in last]
    corner = [at - width // 2 for at, width in zip(centre, patch, strict=True)]
    return [min(max(at, 0), end) for at, end in zip(corner, last, strict=True)]


def cut_patch(sample: Sample, name: str, start: Sequence[int], patch: Size) -> Sample:
    """Cut one patch; zeros, which are background, fill it up where the volume ends."""
    part = Sample(image=window(sample["image"], start, patch), name=name)
    if "label" in sample:
        part["label"] = window(sample["label"], start, patch)
    return part


def tumour_voxel(label: Tensor, generator: torch.Generator) -> list[int] | None:
    """Draw a voxel of a class that is drawn first, so that small classes count as much as large."""
    classes = [value for value in label.flatten().bincount().nonzero()[:, 0].tolist() if value]
    if not classes:
        return None
    chosen = classes[draw(len(classes), generator)]
    places = (label[0] == chosen).flatten().nonzero()[:, 0]
    voxel = places[draw(len(places), generator)]
    return [int(n) for n in torch.unravel_index(voxel, label.shape[1:])]


def draw(count: int, generator: torch.Generator) -> int:
    """Draw one of the numbers from 0 to `count` - 1."""
    return int(torch.randint(count, (), generator=generator))


def window(volume: Tensor, start: Sequence[int], patch: Size) -> Tensor:
    """Cut a window out of a volume, and pad it on both sides where the volume ends."""
    inside = tuple(slice(at, at + n) for at, n in zip(start, patch, strict=True))
    part = volume[(slice(None), *inside)]
    missing = [n - found for n, found in zip(patch, part.shape[1:], strict=True)]
    pads = [side for gap in reversed(missing) for side in (gap // 2, gap - gap // 2)]
    return F.pad(part, pads) if any(missing) else part.clone()
