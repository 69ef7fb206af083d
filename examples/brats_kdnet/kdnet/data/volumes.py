"""Reading NIfTI files with nibabel, with every failure told as the file and its reason.

A header of 348 bytes can ask for more memory than any machine has, and a compressed file of a few
kilobytes can unfold to gigabytes. So what decides how much is read is compared with the size of
the file and with a limit first, and no more than the promised bytes is ever unfolded.
"""

import logging
import math
import os
import zlib
from dataclasses import dataclass
from io import IOBase
from pathlib import Path
from typing import Any, cast

import nibabel as nib
import numpy as np
from nibabel.openers import Opener
from nibabel.spatialimages import HeaderDataError
from nibabel.volumeutils import array_from_file
from numpy.typing import NDArray

from kdnet.data.subjects import ImageFile
from kdnet.errors import UserError

#: Voxels of a volume that is read: 4 GiB as the float64 that scaling gives, beside the stored
#: numbers. 512 x 512 x 2000 fits.
LARGEST_VOLUME = 2**29
#: Environment variable with another limit, in voxels, for whoever has larger volumes.
LIMIT_VARIABLE = "PRIVDISTILL_LARGEST_VOLUME"

#: No scanner is this far from its own origin, mm; beyond it, orientations cannot be worked out.
_LARGEST_COORDINATE = 1e6
#: Where voxels may begin at the latest, and bytes after the last one that some writers pad with.
_LARGEST_OFFSET, _PADDING = 2**26, 2**20
#: Deflate cannot unfold a byte to more (https://zlib.net/zlib_tech.html).
_RATIOS = {".nii": 1, ".gz": 1032}
_HEADERS: dict[int, Any] = {348: nib.Nifti1Header, 540: nib.Nifti2Header}
#: What lies under the name of a volume where a download went wrong, by how it begins.
_FOREIGN = {
    b"version https://git-lfs": "it is a Git LFS pointer, not the file itself; run git lfs pull",
    b"/annex/": "it is a git-annex pointer, not the file itself; run git annex get",
    b"<": "it is a web page (HTML or XML), perhaps of a login; download the file again",
    b"pk\x03\x04": "it is a ZIP archive; unpack it",
}
_ERRORS = (
    *(OSError, EOFError, ValueError, OverflowError, ArithmeticError, zlib.error),
    *(HeaderDataError, KeyError),
)

# nibabel repairs small faults and tells its own logger; what matters is refused here.
_SILENT = logging.Logger("nifti")
_SILENT.disabled = True


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
    header = _header(file)
    spacing = tuple(map(float, header["pixdim"][1:4]))
    try:
        affine = _affine(header)
    except _ERRORS as error:
        raise UnreadableVolumeError(file, f"the affine cannot be used: {error}") from error
    # A label map that is written with this header has no extensions, so its voxels begin earlier.
    header["vox_offset"] = 0
    shape = header.get_data_shape()[:3]
    return Geometry(shape, affine, header, cast("tuple[float, float, float]", spacing))


def read_volume(file: ImageFile) -> NDArray[Any]:
    """Read the voxels of a volume in the type that the file stores, scaled by its header."""
    header = _header(file)
    shape, dtype = header.get_data_shape()[:3], header.get_data_dtype()
    bytes_of_one = math.prod(shape) * dtype.itemsize
    start = int(header["vox_offset"]) + (file.channel or 0) * bytes_of_one
    try:
        with Opener(str(file.path)) as stream:
            stored = array_from_file(shape, dtype, cast("IOBase", stream), offset=start, mmap=False)
            # To the end, where the checksum of a compressed file stands.
            _finish(stream, _end(header) - start - bytes_of_one)
        return _scaled(stored, *header.get_slope_inter())
    except _ERRORS as error:
        raise UnreadableVolumeError(
            file, f"the voxels cannot be read, the file is damaged or cut short ({error})"
        ) from error


def largest_volume() -> int:
    """Return how many voxels a volume may have."""
    given = os.environ.get(LIMIT_VARIABLE, str(LARGEST_VOLUME))
    if not given.isdecimal() or not int(given):
        raise UserError(f"{LIMIT_VARIABLE} is {given!r}; expected a number of voxels.")
    return int(given)


def _header(file: ImageFile) -> Any:
    """The header of a file, without extensions, which may say who the patient is."""
    try:
        size = _check_file(file.path)
        with Opener(str(file.path)) as stream:
            header = _parse(stream.read(544))
        _check_promise(file.path, header, size)
        _check_axes(header.get_data_shape(), file.channel)
    except _ERRORS as error:
        raise UnreadableVolumeError(file, f"cannot be opened as NIfTI: {error}") from error
    return header


def _check_file(path: Path) -> int:
    """Size of a regular file that is what its name says, as far as its first bytes tell."""
    size = path.stat().st_size
    if not path.is_file():
        # To open a pipe would wait for whoever writes into it.
        raise ValueError("expected a file, found a folder, a pipe or a device")
    with path.open("rb") as plain:
        start = plain.read(512)
    if not start:
        raise ValueError("the file is empty")
    for signature, what in _FOREIGN.items():
        if start.lstrip(b"\xef\xbb\xbf \r\n\t").lower().startswith(signature):
            raise ValueError(what)
    named, compressed = path.suffix.lower() == ".gz", start.startswith(b"\x1f\x8b")
    if named != compressed:
        found = "compressed" if compressed else "not compressed"
        raise ValueError(f"the content is {found}, which .gz at the end must say; rename the file")
    return size


def _parse(block: bytes) -> Any:
    """The header, if what decides where and how voxels are read makes sense."""
    order = ">" if block[:2] == b"\0\0" else "<"
    length = int.from_bytes(block[:4], "big" if order == ">" else "little")
    if length not in _HEADERS or len(block) < length:
        raise ValueError("it does not begin with the header of a NIfTI file")
    header = _HEADERS[length](block[:length], endianness=order, check=False)
    axes, magic = int(header["dim"][0]), bytes(header["magic"].item())[:3]
    if magic not in {b"n+1", b"n+2"}:
        # ni1 and ni2 stand in headers whose voxels lie in another file.
        raise ValueError(f"the magic of NIfTI files in one piece is n+1 or n+2, found {magic!r}")
    if not 1 <= axes <= 7 or min(header["dim"][1 : axes + 1]) < 1:
        raise ValueError(f"the header tells of {axes} axes of {header['dim'][1:].tolist()} voxels")
    code, bits = int(header["datatype"]), int(header["bitpix"])
    try:
        dtype = header.get_data_dtype()
    except (HeaderDataError, KeyError) as error:
        raise ValueError(f"the header names a data type {code} that is not known") from error
    if dtype.kind not in "iuf" or bits != 8 * dtype.itemsize:
        raise ValueError(f"expected plain numbers, found {dtype}, of {bits} bits")
    offset, first = float(header["vox_offset"]), 544 if length == 540 else 352
    # Also false for NaN.
    if not first <= offset <= _LARGEST_OFFSET or offset != int(offset):
        raise ValueError(f"its voxels begin at byte {offset:g}; expected {first} or some more")
    # nibabel takes it for none.
    if math.isinf(header["scl_slope"]):
        raise ValueError(f"the header scales voxels by {header['scl_slope']}")
    header.get_slope_inter()
    return header


def _end(header: Any) -> int:
    """Where the voxels end, bytes."""
    count = math.prod(header.get_data_shape()) * header.get_data_dtype().itemsize
    return int(header["vox_offset"]) + int(count)


def _check_promise(path: Path, header: Any, size: int) -> None:
    """Refuse a shape that the file cannot hold, or that no memory can."""
    shape, end = header.get_data_shape()[:3], _end(header)
    if math.prod(shape) > largest_volume():
        raise ValueError(
            f"the header promises {' x '.join(map(str, shape))} voxels, more than the "
            f"{largest_volume():,} that are read; if it is true, set {LIMIT_VARIABLE}"
        )
    # Of other endings nobody knows how far they unfold.
    ratio = _RATIOS.get(path.suffix.lower())
    if ratio is not None and end > ratio * size:
        raise ValueError(
            f"the file is cut short: its header promises {end} bytes, which {size} cannot hold"
        )
    if ratio == 1 and size > end + _PADDING:
        raise ValueError(f"the file goes on for {size - end} bytes after its last voxel")


def _check_axes(shape: tuple[int, ...], channel: int | None) -> None:
    # Some writers add axes of a single volume.
    if channel is None and (len(shape) < 3 or math.prod(shape[3:]) > 1):
        raise ValueError(f"expected three axes, found shape {shape}; name its `channels` if 4-D")
    if channel is not None and (len(shape) != 4 or shape[3] <= channel):
        raise ValueError(f"expected four axes with a channel {channel}, found shape {shape}")


def _affine(header: Any) -> NDArray[np.float64]:
    """The affine, if it says where voxels lie."""
    with np.errstate(all="ignore"):
        header.check_fix(logger=_SILENT, error_level=40)
        affine = np.asarray(header.get_best_affine(), dtype=np.float64)
    if not np.isfinite(affine).all():
        raise ValueError("it is not finite")
    if np.abs(affine).max() > _LARGEST_COORDINATE:
        raise ValueError(f"it holds {np.abs(affine).max():.3g} mm")
    if np.linalg.matrix_rank(affine[:3, :3]) < 3:
        raise ValueError("it is singular, so voxels have no volume")
    return affine


def _finish(stream: Any, promised: int) -> None:
    """Read to the end, which is at most the padding further than what is promised."""
    more = -promised
    while block := stream.read(2**20):
        more += len(block)
        if more > _PADDING:
            raise ValueError("the file goes on for long after its last voxel")
    if more < 0:
        raise EOFError("it ends before its last voxel")


def _scaled(stored: NDArray[Any], slope: float | None, inter: float | None) -> NDArray[Any]:
    """Voxels in the machine's byte order and, if the header asks for it, scaled to float64."""
    if slope is None or (slope, inter) == (1, 0):
        return stored.astype(stored.dtype.newbyteorder("="), copy=False)
    with np.errstate(all="ignore"):
        scaled: NDArray[Any] = np.multiply(stored, slope, dtype=np.float64)
        # In place, as volumes are large.
        scaled += inter
    return scaled
