"""From the files of one subject to the training grid, and from there back to the original one.

The paper's preprocessing (Hu et al. 2020, arXiv:2106.09564, section 3.1): a central crop of 128^3,
z-scores over the non-zero voxels of each modality, subsampling to 64^3. What it leaves open, the
order of the first two and the interpolation, is an option here.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict, get_args

import numpy as np
import torch
from monai.transforms.intensity.array import NormalizeIntensity
from monai.transforms.spatial.array import Resize
from monai.transforms.transform import Transform
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from kdnet.data.description import Description, Size
from kdnet.data.subjects import ImageFile, Subject
from kdnet.data.volumes import Geometry, UnreadableVolumeError, read_geometry, read_volume
from kdnet.errors import UserError

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


class NativeLabel(NamedTuple):
    """A label map on its original grid."""

    classes: NDArray[np.uint8]
    affine: NDArray[np.float64]
    header: Any
    spacing: tuple[float, float, float]


class Preprocessing(Transform):
    """Reads one subject onto the training grid; deterministic, so that its result can be cached."""

    def __init__(
        self,
        description: Description,
        modalities: tuple[str, ...],
        crop: Size | None,
        grid: Size | None,
        *,
        normalise: Normalise = "after_crop",
        resample: Resample = "trilinear",
    ) -> None:
        super().__init__()
        unknown = [name for name in modalities if name not in description.modalities]
        if unknown or not modalities:
            raise UserError(
                f"Data set '{description.name}' has the modalities "
                f"{', '.join(description.modalities)}; asked for {', '.join(modalities) or 'none'}."
            )
        for name, value, known in (
            ("normalise", normalise, get_args(Normalise)),
            ("resample", resample, get_args(Resample)),
        ):
            if value not in known:
                raise UserError(f"{name}: expected one of {', '.join(known)}, found '{value}'.")
        self.description = description
        self.modalities = tuple(modalities)
        self.crop = crop
        self.grid = grid
        self.normalise = normalise
        self.resample = resample
        self._z_score = NormalizeIntensity(nonzero=True, channel_wise=True)
        self._resize_image = Resize(grid, mode=resample) if grid else None
        self._resize_label = Resize(grid, mode="nearest-exact") if grid else None

    def __call__(self, data: Subject) -> Sample:
        """Read one subject."""
        files = [_image_of(data, name) for name in self.modalities]
        channels, nonzero = zip(*map(self._read_channel, files), strict=True)
        if len({channel.shape for channel in channels}) > 1:
            shapes = ", ".join(str(tuple(channel.shape[1:])) for channel in channels)
            raise UserError(f"Subject '{data.name}': modalities differ in shape: {shapes}.")
        image = torch.cat(channels)
        if self.normalise == "after_crop":
            image = _plain(self._z_score(image))
        if self._resize_image is not None:
            image = self._resize_image(image)
        sample = Sample(
            image=_plain(image),
            name=data.name,
            nonzero=torch.tensor(nonzero),
            spacing=torch.tensor(read_geometry(files[0]).spacing),
        )
        if data.segmentation is not None:
            _refuse_rivals(data, "segmentation")
            classes = read_classes(data.segmentation, self.description)
            label = torch.from_numpy(self._cropped(classes))[None]
            if self._resize_label is not None:
                label = self._resize_label(label.float())
            sample["label"] = _plain(label).to(torch.uint8)
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
        native[0] = outside
        into = (slice(None), *(volume for volume, _ in windows))
        native[into] = inside[(slice(None), *(cut for _, cut in windows))]
        return native

    def native_label(self, subject: Subject) -> NativeLabel:
        """Read the label map of a subject as it is, in class indices."""
        if subject.segmentation is None:
            raise UserError(f"Subject '{subject.name}': expected a segmentation, found none.")
        _refuse_rivals(subject, "segmentation")
        classes = read_classes(subject.segmentation, self.description)
        geometry = read_geometry(subject.segmentation)
        return NativeLabel(classes, geometry.affine, geometry.header, geometry.spacing)

    def native_geometry(self, subject: Subject) -> Geometry:
        """Where the voxels of a subject lie, read from its first modality; needs no labels."""
        return read_geometry(_image_of(subject, self.modalities[0]))

    def fingerprint(self) -> str:
        """A name for this preprocessing: any other setting has another one."""
        settings = {
            "version": _VERSION,
            "description": self.description.to_dict(),
            "modalities": self.modalities,
            "crop": self.crop,
            "grid": self.grid,
            "normalise": self.normalise,
            "resample": self.resample,
        }
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def _read_channel(self, file: ImageFile) -> tuple[Tensor, float]:
        """One modality, cropped, (1, X, Y, Z) float32, and its share of non-zero voxels."""
        volume = read_volume(file)
        nonzero = np.count_nonzero(volume) / volume.size
        if self.normalise == "before_crop":
            whole = torch.from_numpy(volume.astype(np.float32))[None]
            volume = _plain(self._z_score(whole))[0].numpy()
        return torch.from_numpy(self._cropped(volume).astype(np.float32))[None], nonzero

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
        whole[~(np.abs(values - whole) <= _LABEL_TOLERANCE)] = np.nan
    classes = np.zeros(values.shape, dtype=np.uint8)
    known = np.zeros(values.shape, dtype=bool)
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


def _image_of(subject: Subject, modality: str) -> ImageFile:
    if modality not in subject.images:
        raise UserError(
            f"Subject '{subject.name}': expected the modality {modality}, found "
            f"{', '.join(subject.images) or 'none'}."
        )
    _refuse_rivals(subject, modality)
    return subject.images[modality]


def _refuse_rivals(subject: Subject, role: str) -> None:
    if role in subject.rivals:
        others = ", ".join(map(str, subject.rivals[role]))
        raise UserError(
            f"Subject '{subject.name}': expected one file for {role}, found {others} too. Remove "
            "all but one, or make the pattern of the description stricter."
        )


def _plain(tensor: Any) -> Tensor:
    """Without MONAI's metadata, which would be pickled with every sample."""
    return torch.Tensor.as_subclass(tensor, torch.Tensor).contiguous()
