"""Reading volumes, with every failure told as the file and its reason."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Any, cast

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from kdnet.data.headers import Header, HeaderFaultError, read_header, read_voxels
from kdnet.data.layouts import ImageFile
from kdnet.errors import UserError

#: No scanner is this far from its own origin, mm; beyond it, orientations cannot be worked out.
_LARGEST_COORDINATE = 1e6
_READ_ERRORS = (OSError, EOFError, ValueError, zlib.error)


class UnreadableVolumeError(UserError):
    """A file that holds no volume that can be used."""

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
    """Read the header of a volume."""
    header = _open(file)
    return Geometry(
        shape=cast("tuple[int, int, int]", header.shape[:3]),
        affine=_affine(header, file),
        header=header.content,
        spacing=header.spacing,
    )


def read_volume(file: ImageFile) -> NDArray[Any]:
    """Read the voxels of a volume in the type that the file stores, scaled by its header."""
    header = _open(file)
    try:
        return read_voxels(file.path, header, file.channel)
    except HeaderFaultError as error:
        raise UnreadableVolumeError(file, error.reason) from error
    except MemoryError as error:
        gigabytes = header.voxels * header.dtype.itemsize / 2**30
        raise UnreadableVolumeError(
            file, f"{header.shape} voxels, {gigabytes:.1f} GiB, do not fit into memory"
        ) from error
    except _READ_ERRORS as error:
        raise UnreadableVolumeError(
            file, f"the voxels cannot be read, the file is damaged or cut short ({error})"
        ) from error


def _open(file: ImageFile) -> Header:
    try:
        header = read_header(file.path)
    except HeaderFaultError as error:
        raise UnreadableVolumeError(file, f"cannot be opened as NIfTI: {error.reason}") from error
    except _READ_ERRORS as error:
        raise UnreadableVolumeError(file, f"cannot be opened as NIfTI ({error})") from error
    _check_shape(header.shape, file)
    return header


def _affine(header: Header, file: ImageFile) -> NDArray[np.float64]:
    """The affine, if it says where voxels lie."""
    try:
        with np.errstate(all="ignore"):
            affine = np.asarray(header.content.get_best_affine(), dtype=np.float64)
    except (HeaderDataError, ValueError, ArithmeticError) as error:
        raise UnreadableVolumeError(file, f"the affine cannot be worked out ({error})") from error
    if not np.isfinite(affine).all():
        raise UnreadableVolumeError(file, "the affine is not finite")
    if np.abs(affine).max() > _LARGEST_COORDINATE:
        raise UnreadableVolumeError(file, f"the affine holds {np.abs(affine).max():.3g} mm")
    if np.linalg.matrix_rank(affine[:3, :3]) < 3:
        raise UnreadableVolumeError(file, "the affine is singular, so voxels have no volume")
    return affine


def _check_shape(shape: tuple[int, ...], file: ImageFile) -> None:
    # Some writers add axes of a single volume.
    if file.channel is None and (len(shape) < 3 or math.prod(shape[3:]) > 1):
        raise UnreadableVolumeError(
            file, f"expected three axes, found shape {shape}; name its `channels` if it is 4-D"
        )
    if file.channel is not None and (len(shape) != 4 or shape[3] <= file.channel):
        raise UnreadableVolumeError(
            file, f"expected four axes with a channel {file.channel}, found shape {shape}"
        )
