"""What is kept of one sample: tensors in few bytes, and what the teacher saw."""

import ctypes
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from privdistill.losses.functional import full_precision

Storage = Literal["full", "half", "8bit"]
Result = TypeVar("Result")

_SUMS = 4  # per channel in a digest


class Entry(NamedTuple):
    """Teacher outputs of one sample.

    Attributes:
        digest: Of the teacher's input, `(1, D)`.
        parts: By output name, the tensors that `encode` made of it, `(1, ...)` each.
    """

    digest: Tensor
    parts: dict[str, tuple[Tensor, ...]]

    @property
    def bytes(self) -> int:
        """Size of the tensors."""
        return sum(t.nbytes for t in self.tensors())

    def tensors(self) -> list[Tensor]:
        """All tensors in a fixed order."""
        return [self.digest, *(t for name in sorted(self.parts) for t in self.parts[name])]

    def checksum(self) -> int:
        """CRC-32 of names, shapes and numbers; tells a damaged file from a sound one."""
        shapes = [(t.dtype, tuple(t.shape)) for t in self.tensors()]
        total = zlib.crc32(repr((sorted(self.parts), shapes)).encode())
        for tensor in self.tensors():
            total = on_bytes(tensor, partial(_crc32, total))
        return total


def _crc32(before: int, data: Any) -> int:
    return zlib.crc32(data, before)


def encode(value: Tensor, storage: Storage) -> tuple[Tensor, ...]:
    """Bring one sample's output into the form in which it is kept, on the CPU.

    Args:
        value: `(1, C, ...)`.
        storage: "full" keeps every bit; "half" float16, clamped to its range; "8bit" 256 levels
            between the least and the largest value of each channel.

    Returns:
        One tensor, or for 8 bits the levels, the least values and the steps. What is not finite,
        or is kept in 16 bits already, stays as it is.

    Example:
        >>> [part.tolist() for part in encode(torch.tensor([[[0.0, 5.1]]]), "8bit")][0]
        [[[0, 255]]]
    """
    value = value.detach().to("cpu", copy=True)
    wide = value.dtype in (torch.float32, torch.float64)
    if storage == "half" and wide:
        limit = torch.finfo(torch.float16).max
        return (value.clamp(-limit, limit).half(),)
    if storage == "8bit" and value.is_floating_point() and bool(value.isfinite().all()):
        space = tuple(range(2, value.ndim))
        low, high = (f(value.float(), space, keepdim=True) for f in (torch.amin, torch.amax))
        step = ((high - low) / 255).clamp_min(torch.finfo(torch.float32).tiny)
        return ((value - low) / step).round().to(torch.uint8), low, step
    return (value,)


def decode(parts: Sequence[Tensor], storage: Storage) -> Tensor:
    """Return what `encode` was given, as far as it is kept.

    Args:
        parts: A batch of what it made, one tensor per part.
        storage: As it was then.

    Returns:
        Values, in float32 where the storage is narrower than they were.

    Example:
        >>> decode(encode(torch.tensor([[[0.0, 5.1]]]), "8bit"), "8bit")
        tensor([[[0.0000, 5.1000]]])
    """
    first = parts[0]
    if len(parts) > 1:
        _, low, step = parts
        return first * step + low
    return first.float() if storage == "half" and first.dtype == torch.float16 else first


def digest(view: Tensor) -> Tensor:
    """Describe an image in a few numbers: its size, and sums with fixed random weights.

    The weights of a voxel are products of one weight per axis, so that the image is read once and
    every voxel counts at its place: a flip, a shift, a hole, noise or another contrast changes the
    sums by far more than rounding does.

    Args:
        view: `(B, C, *spatial)`.

    Returns:
        `(B, 1 + 4 C)` in float32, on the CPU: the norm, then four sums per channel.

    Example:
        >>> digest(torch.ones(2, 3, 8, 8)).shape
        torch.Size([2, 13])
    """
    batch, channels, length = view.shape[:3]
    # One of both is a run of memory, in either layout.
    last = view.movedim(1, -1)
    flat = last if last.is_contiguous() else view
    flat = flat.reshape(batch, -1).float()
    norm = torch.linalg.vector_norm(flat, dim=1)
    if not bool(norm.isfinite().all()):
        # Where values are missing is a part of the image, too.
        flat = flat.nan_to_num(3.0, 5.0, -5.0)
        norm = torch.linalg.vector_norm(flat, dim=1)
    with full_precision(view):
        if last.is_contiguous():
            sums = _weights(length, 0).to(flat) @ flat.reshape(batch, length, -1)
            sums = sums.reshape(batch, _SUMS, *view.shape[3:], channels).movedim(-1, 1)
        else:
            sums = _weights(length, 0).to(flat) @ flat.reshape(batch * channels, length, -1)
            sums = sums.reshape(batch, channels, _SUMS, *view.shape[3:])
    for axis, size in reversed(list(enumerate(view.shape[3:], start=1))):
        weights = _weights(size, axis).to(flat).reshape(_SUMS, *[1] * (sums.ndim - 4), size)
        sums = (sums * weights).sum(-1)
    return torch.cat((norm[:, None], sums.flatten(1)), dim=1).cpu()


def _weights(size: int, axis: int) -> Tensor:
    """Numbers `(4, size)` of both signs and never near zero, the same ones in every run."""
    position = torch.arange(1, size + 1, dtype=torch.float64)
    factors = torch.tensor([12.9898, 78.233, 37.719, 94.673], dtype=torch.float64) + axis
    noise = (torch.sin(factors[:, None] * position) * 43758.5453).frac()
    return noise + torch.where(noise < 0, -0.5, 0.5)


def distance(one: Tensor, other: Tensor) -> float:
    """How much two digests differ, as a share of the image's norm.

    Args:
        one: `(1, D)`.
        other: Likewise.

    Returns:
        0 for equal ones; infinity where their lengths differ.
    """
    if one.shape != other.shape:
        return float("inf")
    norm = torch.maximum(one[0, 0], other[0, 0]).clamp_min(1e-12)
    return float((one - other).abs().max() / norm)


def on_bytes(tensor: Tensor, function: Callable[[Any], Result]) -> Result:
    """Apply a function to the memory of a tensor, without numpy.

    Args:
        tensor: Any tensor; read in its logical order.
        function: Takes a buffer.

    Returns:
        What the function returns.
    """
    flat = tensor.detach().cpu().contiguous()
    return function((ctypes.c_char * flat.nbytes).from_address(flat.data_ptr()))


def join(entries: Sequence[Entry], device: torch.device, storage: Storage) -> Mapping[str, Tensor]:
    """Put samples together to a batch.

    Args:
        entries: One per sample, of the same outputs.
        device: Where the batch goes.
        storage: How they are kept.

    Returns:
        Outputs by name, `(B, ...)`, in the memory layout they had.
    """
    batch = {}
    for name in entries[0].parts:
        columns = zip(*(entry.parts[name] for entry in entries), strict=True)
        # cat, unlike stack, keeps channels-last samples channels-last.
        parts = [torch.cat(column).to(device, non_blocking=True) for column in columns]
        batch[name] = decode(parts, storage)
    return batch
