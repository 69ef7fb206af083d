"""What tells one teacher from another, and one input from another."""

import ctypes
import hashlib
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
    if isinstance(value, torch.ScriptObject):
        value = value.__getstate__()
    if isinstance(value, Mapping):
        value = list(value.items())
    if isinstance(value, Tensor):
        value = [f"{value.dtype} {tuple(value.shape)}", _numbers(value)]
    if isinstance(value, list | tuple):
        # Digests are equally long, so that no two lists read alike.
        return _sha256("".join(map(hashed, value)).encode())
    # Neither an address nor the order of a set is the same in another process.
    value = sorted(map(repr, value)) if isinstance(value, AbstractSet) else value
    return _sha256(_ADDRESS.sub("", repr(value)).encode())


def _numbers(tensor: Tensor) -> str | dict[str, Any]:
    """The digest of a tensor's memory, or what a tensor without any consists of."""
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_meta or (tensor.numel() and not tensor.data_ptr()):
        return vars(tensor)
    flat = tensor.detach().cpu().contiguous()
    # Without numpy, which may be missing.
    return _sha256((ctypes.c_char * flat.nbytes).from_address(flat.data_ptr()))


def _sha256(content: Any) -> str:
    return hashlib.sha256(content).hexdigest()


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
    values = view.permute(0, *axes).float()
    if not bool(values.sum().isfinite()):
        # Where values are missing is a part of the image, too.
        values = values.nan_to_num(3.0, 5.0, -5.0)
    norm = torch.linalg.vector_norm(values.flatten(1), dim=1, keepdim=True)
    *others, last, fastest = [_weights(view.shape[axis], axis).to(values) for axis in axes]
    # Two at once: the fastest may be the channels, of which there are few.
    with torch.autocast(view.device.type, enabled=False):
        sums = values.flatten(-2) @ (last[:, None] * fastest).flatten(0, 1)
    for weights in reversed(others):
        sums = (sums * weights).sum(-2)
    return torch.cat((norm, sums), dim=1).cpu()


def _weights(size: int, axis: int) -> Tensor:
    """Numbers `(size, 4)` of both signs and never near zero, the same ones in every run."""
    position = torch.arange(1, size + 1, dtype=torch.float64)
    factors = torch.tensor([12.9898, 78.233, 37.719, 94.673], dtype=torch.float64) + axis
    noise = (torch.sin(position[:, None] * factors) * 43758.5453).frac()
    return noise + torch.where(noise < 0, -0.5, 0.5)
