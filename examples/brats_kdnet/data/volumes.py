"""Reading volumes, with every failure told as the file and its reason."""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from typing import Any, cast

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError, SerializableImage
from nibabel.spatialimages import SpatialImage
from numpy.typing import NDArray

from data.layouts import ImageFile
from errors import UserError

_READ_ERRORS = (OSError, EOFError, ValueError, zlib.error, ImageFileError)


class UnreadableVolumeError(UserError):
    """A file that holds no volume that can be used.

    Args:
        file: The file.
        reason: What is wrong with it.
    """

    def __init__(self, file: ImageFile, reason: str) -> None:
        super().__init__(f"{file.path}: {reason}")
        self.file = file
        self.reason = reason


@dataclass(frozen=True)
class Geometry:
    """Where the voxels of a volume lie.

    Attributes:
        shape: Voxels along the three axes.
        affine: Voxel-to-world matrix, (4, 4), mm.
        header: The file's own header, for writing label maps beside it.
        spacing: Voxel size from the header, mm.
    """

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]
    header: Any
    spacing: tuple[float, float, float]

    @property
    def orientation(self) -> str:
        """Axis codes of the affine, such as "LPS"."""
        codes = nib.orientations.aff2axcodes(self.affine)  # type: ignore[no-untyped-call]
        return "".join(map(str, codes))


def read_geometry(file: ImageFile) -> Geometry:
    """Read the header of a volume.

    Args:
        file: A NIfTI file, 3-D, or 4-D with a channel.

    Returns:
        Shape, affine, header and voxel size.

    Raises:
        UnreadableVolumeError: If the file cannot be opened or does not have three axes.
    """
    image = _open(file)
    _check_shape(image.shape, file)
    zooms = image.header.get_zooms()
    return Geometry(
        shape=cast("tuple[int, int, int]", tuple(int(n) for n in image.shape[:3])),
        affine=np.asarray(image.affine, dtype=np.float64),
        header=image.header,
        spacing=cast("tuple[float, float, float]", tuple(float(zoom) for zoom in zooms[:3])),
    )


def read_volume(file: ImageFile) -> NDArray[Any]:
    """Read the voxels of a volume in the type that the file stores, scaled by its header.

    Args:
        file: A NIfTI file, 3-D, or 4-D with a channel.

    Returns:
        (X, Y, Z), integers or floating-point numbers.

    Raises:
        UnreadableVolumeError: If the file is damaged, or holds no plain numbers on three axes.
    """
    image = _open(file)
    _check_shape(image.shape, file)
    try:
        volume: NDArray[Any] = np.asarray(_voxels(image, file))
    except _READ_ERRORS as error:
        raise UnreadableVolumeError(
            file, f"the voxels cannot be read, the file is damaged or cut short ({error})"
        ) from error
    if volume.dtype.kind not in "iuf":
        raise UnreadableVolumeError(file, f"expected plain numbers, found type {volume.dtype}")
    return volume


def _open(file: ImageFile) -> SpatialImage:
    try:
        return cast("SpatialImage", nib.load(file.path))
    except _READ_ERRORS as error:
        raise UnreadableVolumeError(file, f"cannot be opened as NIfTI ({error})") from error


def _voxels(image: SpatialImage, file: ImageFile) -> Any:
    if file.channel is not None:
        return image.dataobj[..., file.channel]
    if file.path.suffix == ".gz" and isinstance(image, SerializableImage):
        # Read to the end of the stream, where its checksum stands: nibabel stops at the last
        # voxel, and would take a damaged file for a good one.
        with gzip.open(file.path) as stream:
            return type(image).from_bytes(stream.read()).dataobj
    return image.dataobj


def _check_shape(shape: tuple[int, ...], file: ImageFile) -> None:
    if file.channel is None and len(shape) != 3:
        raise UnreadableVolumeError(
            file, f"expected three axes, found shape {shape}; name its `channels` if it is 4-D"
        )
    if file.channel is not None and (len(shape) != 4 or shape[3] <= file.channel):
        raise UnreadableVolumeError(
            file, f"expected four axes with a channel {file.channel}, found shape {shape}"
        )
