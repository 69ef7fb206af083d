"""What a NIfTI file promises, checked before a voxel is read.

A header of 348 bytes can ask for more memory than any machine has, and a compressed file of a few
kilobytes can unfold to gigabytes. Here everything that decides how much is read is compared with
the size of the file and with a limit first, and no more than the promised bytes is ever unfolded.

Source: the NIfTI-1.1 and NIfTI-2 headers, https://nifti.nimh.nih.gov.
"""

from __future__ import annotations

import gzip
import logging
import math
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import nibabel as nib
import numpy as np
from nibabel.openers import Opener
from nibabel.spatialimages import HeaderDataError
from nibabel.volumeutils import apply_read_scaling
from numpy.typing import NDArray

#: Voxels of a volume that is read: 4 GiB as the float64 that scaling gives, beside the stored
#: numbers unless those have 8 bytes, too. 512 x 512 x 2000 fits.
LARGEST_VOLUME = 2**29
#: Environment variable with another limit, in voxels, for whoever has larger volumes.
LIMIT_VARIABLE = "PRIVDISTILL_LARGEST_VOLUME"

_BLOCK = 2**20
#: Where voxels may begin at the latest; what lies before them are extensions.
_LARGEST_OFFSET = 2**26
#: Bytes after the last voxel that are let pass, as some writers pad.
_PADDING = 2**20
#: Deflate cannot unfold a byte to more (https://zlib.net/zlib_tech.html).
_DEFLATE_RATIO = 1032
_GZIP = b"\x1f\x8b"
_CLASSES: dict[int, Any] = {348: nib.Nifti1Header, 540: nib.Nifti2Header}

# nibabel repairs small faults and tells its own logger; what matters is refused here.
_SILENT = logging.Logger("nifti")
_SILENT.disabled = True


class HeaderFaultError(Exception):
    """A file whose header or size says that it holds no volume that can be used."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Header:
    """A header that can be believed as far as sizes go.

    Attributes:
        content: nibabel's header, without extensions, which may say who the patient is.
        shape: Voxels along every axis.
        dtype: Of the stored numbers, with their byte order.
        offset: Where the voxels begin, bytes.
        scaling: Slope and intercept; None if the numbers are meant as they are.
        spacing: Voxel size as it is written, mm; perhaps not positive.
    """

    content: Any
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int
    scaling: tuple[float, float] | None
    spacing: tuple[float, float, float]

    @property
    def voxels(self) -> int:
        """Voxels of one volume, which a 4-D file holds several of."""
        return math.prod(self.shape[:3])

    @property
    def end(self) -> int:
        """Where the voxels end, bytes."""
        return self.offset + math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> Header:
    """Read the header of a NIfTI file and compare it with the size of the file."""
    size = _size(path)
    with open_stream(path) as stream:
        content = _parse(stream.read(544))
    shape, dtype = _shape(content), _dtype(content)
    header = Header(
        content=content,
        shape=shape,
        dtype=dtype,
        offset=_offset(content),
        scaling=_scaling(content),
        spacing=cast("tuple[float, float, float]", tuple(map(float, content["pixdim"][1:4]))),
    )
    _check_promise(path, header, size)
    _repair(content)
    return header


def read_voxels(path: Path, header: Header, channel: int | None = None) -> NDArray[Any]:
    """Read one volume, scaled by its header."""
    count = header.voxels * header.dtype.itemsize
    stored = np.empty(count, dtype=np.uint8)
    with open_stream(path) as stream:
        _skip(stream, header.offset + (channel or 0) * count)
        _fill(stream, stored)
        read = header.offset + ((channel or 0) + 1) * count
        _finish(stream, header.end - read)
    volume = stored.view(header.dtype).reshape(header.shape[:3], order="F")
    if not header.dtype.isnative:
        volume = volume.byteswap(inplace=True).view(header.dtype.newbyteorder("="))
    return volume if header.scaling is None else _scaled(volume, *header.scaling)


def _scaled(volume: NDArray[Any], slope: float, inter: float) -> NDArray[Any]:
    """Scale as nibabel does, slice by slice, so that no second copy of a volume is made."""
    with np.errstate(all="ignore"):
        kind = apply_read_scaling(volume[..., :1], slope, inter).dtype
        same = kind.itemsize == volume.itemsize
        scaled = volume.view(kind) if same else np.empty(volume.shape, kind, order="F")
        for index in range(volume.shape[2]):
            scaled[..., index] = apply_read_scaling(volume[..., index], slope, inter)
    return scaled


@contextmanager
def open_stream(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading, unfolded if it is compressed."""
    with path.open("rb") as plain:
        compressed = plain.read(2) == _GZIP
    if path.suffix.lower() != ".gz":
        if compressed:
            raise HeaderFaultError(
                "the content is gzip-compressed, the name does not end in .gz; rename it"
            )
        with Opener(str(path)) as stream:
            yield cast("BinaryIO", stream)
        return
    if not compressed:
        raise HeaderFaultError(
            "the name ends in .gz, the content is not gzip-compressed; rename it or compress it"
        )
    with gzip.open(path) as unfolded:
        yield cast("BinaryIO", unfolded)


def largest_volume() -> int:
    """Return how many voxels a volume may have."""
    given = os.environ.get(LIMIT_VARIABLE)
    if given is None:
        return LARGEST_VOLUME
    if not given.isdecimal() or not int(given):
        raise HeaderFaultError(f"{LIMIT_VARIABLE} is {given!r}; expected a number of voxels")
    return int(given)


def _size(path: Path) -> int:
    """Size of a regular file that is not empty."""
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise HeaderFaultError("expected a file, found a folder")
    if not stat.S_ISREG(status.st_mode):
        raise HeaderFaultError("expected a file, found a pipe or a device")
    if not status.st_size:
        raise HeaderFaultError("the file is empty")
    return status.st_size


def _parse(block: bytes) -> Any:
    if len(block) < 348:
        raise HeaderFaultError(f"it holds {len(block)} bytes, less than a header")
    for order in "<>":
        (length,) = struct.unpack(f"{order}i", block[:4])
        if length in _CLASSES and len(block) >= length:
            content = _CLASSES[length](block[:length], endianness=order, check=False)
            break
    else:
        raise HeaderFaultError("it does not begin with the header of a NIfTI file")
    magic = bytes(content["magic"].item())
    if magic.startswith((b"ni1", b"ni2")):
        raise HeaderFaultError("it is a header whose voxels lie in another file; join them to .nii")
    if not magic.startswith((b"n+1", b"n+2")):
        raise HeaderFaultError(f"the magic of NIfTI files is n+1 or n+2, found {magic!r}")
    return content


def _shape(content: Any) -> tuple[int, ...]:
    axes = int(content["dim"][0])
    if not 1 <= axes <= 7:
        raise HeaderFaultError(f"the header tells of {axes} axes")
    shape = tuple(int(n) for n in content["dim"][1 : axes + 1])
    if min(shape) < 1:
        raise HeaderFaultError(f"an axis has no voxels, the shape is {shape}")
    return shape


def _dtype(content: Any) -> np.dtype[Any]:
    try:
        dtype: np.dtype[Any] = np.dtype(content.get_data_dtype())
    except (HeaderDataError, KeyError) as error:
        code = int(content["datatype"])
        raise HeaderFaultError(f"the header names a data type {code} that is not known") from error
    if dtype.kind not in "iuf":
        raise HeaderFaultError(f"expected plain numbers, found type {dtype}")
    bits, own = int(content["bitpix"]), 8 * dtype.itemsize
    if bits != own:
        raise HeaderFaultError(
            f"the header contradicts itself: type {dtype.name} has {own} bits per voxel, it says "
            f"{bits}"
        )
    return dtype


def _offset(content: Any) -> int:
    value, first = float(content["vox_offset"]), 544 if content["sizeof_hdr"] == 540 else 352
    # Also false for NaN.
    if not first <= value <= _LARGEST_OFFSET or value != int(value):
        raise HeaderFaultError(
            f"the header says that voxels begin at byte {value:g}; expected {first} to "
            f"{_LARGEST_OFFSET}"
        )
    return int(value)


def _scaling(content: Any) -> tuple[float, float] | None:
    slope, inter = float(content["scl_slope"]), float(content["scl_inter"])
    # By the standard, 0 says that nothing is scaled; nibabel writes NaN for the same.
    if slope == 0 or math.isnan(slope):
        return None
    if not math.isfinite(slope) or not math.isfinite(inter):
        raise HeaderFaultError(f"the header scales voxels by {slope:g} and adds {inter:g}")
    return slope, inter


def _check_promise(path: Path, header: Header, size: int) -> None:
    if header.voxels > largest_volume():
        edges = " x ".join(map(str, header.shape[:3]))
        raise HeaderFaultError(
            f"the header promises {edges} voxels, more than the {largest_volume():,} that are "
            f"read; if it is true, set {LIMIT_VARIABLE}"
        )
    compression = {".gz": _DEFLATE_RATIO}.get(path.suffix.lower())
    if path.suffix.lower() == ".nii":
        compression = 1
    if compression is not None and header.end > compression * size:
        raise HeaderFaultError(
            f"the file is cut short: its header promises {header.end} bytes, which {size} bytes "
            "cannot hold"
        )
    if compression == 1 and size > header.end + _PADDING:
        raise HeaderFaultError(_goes_on(size - header.end))


def _goes_on(more: int) -> str:
    return f"the file goes on for {more} bytes or more after the last voxel of its header"


def _repair(content: Any) -> None:
    """Let nibabel mend what it always mends, such as a qfac of 0."""
    try:
        content.check_fix(logger=_SILENT, error_level=40)
    except (HeaderDataError, ValueError) as error:
        raise HeaderFaultError(str(error)) from error
    # A label map that is written with this header has no extensions, so its voxels begin earlier.
    content["vox_offset"] = 0


def _skip(stream: BinaryIO, count: int) -> None:
    while count > 0:
        read = len(stream.read(min(count, _BLOCK)))
        if not read:
            raise EOFError("it ends before its voxels")
        count -= read


def _fill(stream: BinaryIO, stored: NDArray[np.uint8]) -> None:
    target = stored.data
    position = 0
    while position < len(target):
        block = stream.read(min(_BLOCK, len(target) - position))
        if not block:
            raise EOFError(f"it ends after {position} of {len(target)} bytes of voxels")
        target[position : position + len(block)] = block
        position += len(block)


def _finish(stream: BinaryIO, promised: int) -> None:
    """Read to the end, which is at most the padding further than what is promised."""
    _skip(stream, promised)
    more = 0
    while block := stream.read(_BLOCK):
        more += len(block)
        if more > _PADDING:
            raise HeaderFaultError(_goes_on(more))
