"""What is kept of one sample: tensors in few bytes, and what the teacher saw."""

import ctypes
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Storage = Literal["full", "half", "8bit"]
Result = TypeVar("Result")

_BINS = 64  # slices of the first axis whose mean is in a digest
_PROBES = 4  # voxels per axis that are in it


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
        """CRC-32 of all tensors; tells a damaged file from a sound one."""
        total = 0
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
    """Describe an image in a few hundred numbers: slice means, and voxels of a coarse grid.

    Cheap, since each image is described in every step; a flip, a crop, noise or another contrast
    changes it by far more than rounding does.

    Args:
        view: `(B, C, *spatial)`.

    Returns:
        `(B, D)` in float32, on the CPU.

    Example:
        >>> digest(torch.arange(4.0).reshape(1, 1, 4))
        tensor([[0., 1., 2., 3., 0., 1., 2., 3.]])
    """
    # One mean for all channels: in both memory layouts a slice is then long runs of numbers.
    batch, channels, length = view.shape[:3]
    last = view.movedim(1, -1)
    if last.is_contiguous():
        slices = last.reshape(batch, 1, length, -1).mean(3, dtype=torch.float32)
    else:
        each = view.reshape(batch, channels, length, -1).mean(3, dtype=torch.float32)
        slices = each.mean(1, keepdim=True)
    slices = F.adaptive_avg_pool1d(slices, min(_BINS, slices.shape[2]))
    steps = [-(-length // _PROBES) for length in view.shape[2:]]
    coarse = [slice(step // 2, None, step) for step in steps]
    probes = view[:, :, *coarse].float()
    return torch.cat((slices.flatten(1), probes.flatten(1)), dim=1).cpu()


def distance(one: Tensor, other: Tensor) -> float:
    """How much two digests differ, as a share of the largest number in them.

    Args:
        one: `(1, D)`.
        other: Likewise.

    Returns:
        0 for equal ones, not-a-number in the same places counting as equal; infinity where their
        lengths differ.
    """
    if one.shape != other.shape:
        return float("inf")
    gap = torch.where(one.isnan() & other.isnan(), 0.0, (one - other).abs())
    scale = torch.maximum(one.abs(), other.abs()).nan_to_num(0.0).max().clamp_min(1e-12)
    return float((gap.max() / scale).nan_to_num(float("inf")))


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
