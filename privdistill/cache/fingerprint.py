"""What tells one teacher from another, and one input from another."""

import ctypes
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor, nn

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


class Fingerprint:
    """A digest of teachers and of what is asked of them, made anew when a weight changes.

    Of each teacher count the class names of its modules, and name, type, shape and numbers of its
    parameters, buffers and other state, such as packed weights. A compiled teacher has the
    fingerprint of what it was compiled from, and every process takes the same one. What a forward
    does beyond that is not seen; `TeacherCache(version=...)` names it.

    Args:
        teachers: The networks.

    Example:
        >>> teacher, other = nn.Conv2d(1, 2, 1), nn.Conv2d(1, 2, 1)
        >>> Fingerprint([teacher]).current("t1") == Fingerprint([other]).current("t1")
        False
    """

    def __init__(self, teachers: Sequence[nn.Module]) -> None:
        self.teachers = teachers
        self._seen: list[tuple[int, ...]] | None = None
        self._weights = ""

    def current(self, extra: str) -> str:
        """Return the digest of the teachers as they are now.

        Args:
            extra: What else decides their outputs: views, taps, which outputs are kept.

        Returns:
            64 hexadecimal digits.
        """
        # Hashing millions of weights takes longer than a look at their version counters.
        seen = [_version(t) for net in self.teachers for t in (*net.parameters(), *net.buffers())]
        if seen != self._seen:
            self._weights, self._seen = hashed([_state(teacher) for teacher in self.teachers]), seen
        return hashed([self._weights, extra])


def written(function: object) -> str:
    """Name a function, or an object by its class, as it is written in the code.

    Args:
        function: Anything; None is a name, too.

    Returns:
        The same text in every process.
    """
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def _version(tensor: Tensor) -> tuple[int, ...]:
    """What changes when a tensor does, without a look at its numbers."""
    memory = tensor.data_ptr() if tensor.layout == torch.strided else 0
    return id(tensor), memory, 0 if tensor.is_inference() else tensor._version  # noqa: SLF001


def _state(teacher: nn.Module) -> list[dict[str, Any]]:
    """Class names and everything that is held, by the names of a network that is not compiled."""
    # The class behind a compiled one has its name, so that it takes its place.
    classes = {_plain(name): type(module).__qualname__ for name, module in teacher.named_modules()}
    # A state may leave out buffers, and nothing else holds packed weights.
    held = {**dict(teacher.named_parameters()), **dict(teacher.named_buffers())}
    state = held | teacher.state_dict(keep_vars=True)
    return [classes, {_plain(name): value for name, value in state.items()}]


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def hashed(value: object) -> str:
    """Hash tensors and what holds them: mappings, lists, packed weights, or anything else.

    Args:
        value: Of tensors count type, shape and numbers, of what is none of these its text.

    Returns:
        64 hexadecimal digits, the same in every process.
    """
    total = hashlib.sha256()
    _add(total, value)
    return total.hexdigest()


def _add(total: Any, value: object) -> None:
    if isinstance(value, Tensor):
        total.update(f"{value.dtype} {tuple(value.shape)}".encode())
        value = _numbers(value)
    if isinstance(value, torch.ScriptObject):
        value = value.__getstate__()
    if isinstance(value, Mapping):
        value = list(value.items())
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous()
        # The tensor's memory, without numpy.
        total.update((ctypes.c_char * flat.nbytes).from_address(flat.data_ptr()))
    elif isinstance(value, list | tuple):
        for part in (f"{len(value)} parts", *value):
            _add(total, part)
    else:
        # Neither an address nor the order of a set is the same in another process.
        value = sorted(map(repr, value)) if isinstance(value, AbstractSet) else value
        total.update(f"{_ADDRESS.sub('', repr(value))}\n".encode())


def _numbers(tensor: Tensor) -> Tensor | dict[str, Any]:
    """A tensor that has memory for each of its numbers, or what a tensor consists of."""
    if tensor.is_meta:
        return {}
    if tensor.is_quantized:
        return tensor.dequantize()
    if tensor.layout != torch.strided:
        return tensor.to_dense()
    # A subclass without memory of its own keeps its numbers in other tensors.
    return vars(tensor) if tensor.numel() and not tensor.data_ptr() else tensor


def digest(view: Tensor) -> Tensor:
    """Describe an image in a few numbers: its norm, and sums with fixed random weights.

    The weights of a voxel are products of one weight per axis, so that the image is read once and
    every voxel counts at its place: a flip, a shift, a hole, noise or another contrast changes the
    sums by far more than rounding does.

    Args:
        view: `(B, C, *spatial)`.

    Returns:
        `(B, 5)` in float32, on the CPU: the norm, then four sums.

    Example:
        >>> digest(torch.ones(2, 3, 8, 8)).shape
        torch.Size([2, 5])
    """
    # In the order of memory, whatever the layout: a copy would take longer than the sums.
    axes = sorted(range(1, view.ndim), key=view.stride, reverse=True)
    sizes = [view.shape[axis] for axis in axes]
    values = view.permute(0, *axes).float()
    norm = torch.linalg.vector_norm(values.flatten(1), dim=1, keepdim=True)
    if not bool(norm.isfinite().all()):
        # Where values are missing is a part of the image, too.
        values = values.nan_to_num(3.0, 5.0, -5.0)
        norm = torch.linalg.vector_norm(values.flatten(1), dim=1, keepdim=True)
    # A spatial axis goes first: it is long, so that little is left of the image for the others.
    first = axes.index(2)
    axes.remove(2)
    rows = values.reshape(len(view), math.prod(sizes[:first]), sizes.pop(first), -1)
    with torch.autocast(view.device.type, enabled=False):
        sums = (_weights(view.shape[2], 2).to(values) @ rows).transpose(1, 2)
    for axis, size in zip(axes, sizes, strict=True):
        weights = _weights(size, axis).to(values)
        sums = (sums.reshape(len(view), len(weights), size, -1) * weights[..., None]).sum(2)
    return torch.cat((norm, sums[..., 0]), dim=1).cpu()


def _weights(size: int, axis: int) -> Tensor:
    """Numbers `(4, size)` of both signs and never near zero, the same ones in every run."""
    position = torch.arange(1, size + 1, dtype=torch.float64)
    factors = torch.tensor([12.9898, 78.233, 37.719, 94.673], dtype=torch.float64) + axis
    noise = (torch.sin(factors[:, None] * position) * 43758.5453).frac()
    return noise + torch.where(noise < 0, -0.5, 0.5)
