"""From the files of one subject to the training grid, and from there back to the original one.

The paper's preprocessing (Hu et al. 2020, arXiv:2106.09564, section 3.1): a central crop of 128^3,
z-scores over the non-zero voxels of each modality, subsampling to 64^3. What it leaves open, the
order of the first two and the interpolation, is an option here.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal, NotRequired, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from kdnet.data.description import Description, Size
from kdnet.data.subjects import ImageFile, Subject
from kdnet.data.volumes import UnreadableVolumeError, read_geometry, read_volume

Normalise = Literal["before_crop", "after_crop"]
Resample = Literal["trilinear", "area"]

#: Part of the fingerprint: raise it whenever the same settings begin to give other numbers.
_VERSION = 2
#: How far a label may lie from a whole number, as scaling and interpolation leave it.
_LABEL_TOLERANCE = 1e-3


class Sample(TypedDict):
    """One preprocessed subject: image (M, *grid) float32, label (1, *grid) uint8.

    Of the files it tells the share of non-zero voxels, (M,), and the voxel size, (3,) mm.
    """

    image: Tensor
    label: NotRequired[Tensor]
    name: str
    nonzero: NotRequired[Tensor]
    spacing: NotRequired[Tensor]


@dataclass(frozen=True)
class Preprocessing:
    """Reads one subject onto the training grid; deterministic, so that its result can be cached.

    Attributes:
        description: Of the data set.
        modalities: What is read, in channel order.
        crop: Central crop, voxels; None for the whole volume.
        grid: Grid after resampling, voxels; None if subjects keep their own.
        normalise: Whether z-scores are of the crop or of the whole volume.
        resample: How images reach the grid.
    """

    description: Description
    modalities: tuple[str, ...]
    crop: Size | None
    grid: Size | None
    normalise: Normalise = "after_crop"
    resample: Resample = "trilinear"

    def __call__(self, subject: Subject) -> Sample:
        """Read one subject, whose files were checked."""
        files = [subject.images[name] for name in self.modalities]
        channels, nonzero = zip(*map(self._read_channel, files), strict=True)
        # The paper leaves the order open; statistics of what the network sees are the default.
        if self.normalise == "after_crop":
            channels = tuple(map(self._z_score, channels))
        sample = Sample(
            image=self._resampled(torch.stack(channels), self.resample),
            name=subject.name,
            nonzero=torch.tensor(nonzero),
            spacing=torch.tensor(read_geometry(files[0]).spacing),
        )
        if subject.segmentation is not None:
            classes = self._cropped(read_classes(subject.segmentation, self.description))
            # Nearest neighbours: between two labels there is no third.
            label = torch.from_numpy(classes)[None].float()
            sample["label"] = self._resampled(label, "nearest-exact").to(torch.uint8)
        return sample

    def to_native(
        self, probabilities: Tensor, shape: tuple[int, int, int], *, outside: float = 1.0
    ) -> Tensor:
        """Bring a prediction back to the original grid: trilinear, then pasted into the volume."""
        extent = self.crop or shape
        inside = probabilities
        if tuple(probabilities.shape[1:]) != extent:
            inside = F.interpolate(
                probabilities[None], size=extent, mode="trilinear", align_corners=False
            )[0]
        windows = [central_window(n, crop) for n, crop in zip(shape, extent, strict=True)]
        native = probabilities.new_zeros((probabilities.shape[0], *shape))
        # What lies outside of the crop is background for certain: its channel is 1 there.
        native[0] = outside
        into = (slice(None), *(volume for volume, _ in windows))
        native[into] = inside[(slice(None), *(cut for _, cut in windows))]
        return native

    def fingerprint(self) -> str:
        """A name for this preprocessing: any other setting has another one."""
        settings = asdict(self) | {
            "version": _VERSION,
            "description": self.description.to_dict(),
        }
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def _read_channel(self, file: ImageFile) -> tuple[Tensor, float]:
        """One modality, cropped, (X, Y, Z) float32, and its share of non-zero voxels."""
        volume = read_volume(file)
        nonzero = np.count_nonzero(volume) / volume.size
        if self.normalise == "before_crop":
            volume = self._z_score(torch.from_numpy(volume.astype(np.float32))).numpy()
        return torch.from_numpy(self._cropped(volume).astype(np.float32)), nonzero

    def _z_score(self, image: Tensor) -> Tensor:
        """Give the voxels that are not background mean 0 and deviation 1."""
        noisy = self.description.background == "noise"
        brain = torch.ones_like(image, dtype=torch.bool) if noisy else image != 0
        if not brain.any():
            return image
        values = image[brain]
        # An image of one value has no deviation to divide by.
        deviation = values.std(unbiased=False).item() or 1.0
        normalised = image.clone()
        normalised[brain] = (values - values.mean().item()) / deviation
        return normalised

    def _resampled(self, image: Tensor, mode: str) -> Tensor:
        if self.grid is None:
            return image.contiguous()
        return F.interpolate(image[None], size=self.grid, mode=mode)[0].contiguous()

    def _cropped(self, volume: NDArray[Any]) -> NDArray[Any]:
        if self.crop is None:
            return volume
        windows = [central_window(n, c) for n, c in zip(volume.shape, self.crop, strict=True)]
        cropped = np.zeros(self.crop, dtype=volume.dtype)
        cropped[tuple(cut for _, cut in windows)] = volume[tuple(whole for whole, _ in windows)]
        return cropped


def central_window(size: int, crop: int) -> tuple[slice, slice]:
    """Where a central crop, or a padded one, meets a volume along one axis."""
    if size >= crop:
        # As MONAI crops, so that networks trained with it see the same voxels.
        start = size // 2 - crop // 2
        return slice(start, start + crop), slice(0, crop)
    start = (crop - size) // 2
    return slice(0, size), slice(start, start + size)


def read_classes(file: ImageFile, description: Description) -> NDArray[np.uint8]:
    """Read a label map as class indices."""
    values = read_volume(file)
    whole = values
    if values.dtype.kind == "f":
        whole = np.rint(values)
        # NaN equals no label, and so is told as unknown.
        whole[~(np.abs(values - whole) <= _LABEL_TOLERANCE)] = np.nan
    classes = np.zeros(values.shape, dtype=np.uint8)
    known = np.zeros(values.shape, dtype=bool)
    # One pass for each label: files hold values that no table could be as long as.
    for value, index in description.labels.items():
        found = whole == value
        classes[found] = index
        known |= found
    if not known.all():
        unknown = np.unique(values[~known])
        listed = ", ".join(f"{value:.9g}" for value in unknown[:5])
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise UnreadableVolumeError(
            file,
            f"unknown label {listed}{more} in {int((~known).sum())} voxels; data set "
            f"'{description.name}' names {', '.join(map(str, description.labels))}",
        )
    return classes
