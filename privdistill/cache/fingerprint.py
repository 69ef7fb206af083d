"""Which teacher an output came from."""

import hashlib
import inspect
import re
from collections.abc import Iterable, Sequence
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from privdistill.cache.entries import on_bytes
from privdistill.sides.frozen import CLAIM

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
# What torch keeps in every module, and the wrapper in a teacher: neither changes an output of a
# frozen one, while modes and gradient flags from before, kept there, differ from run to run.
_NO_OPTION = frozenset(vars(nn.Module())) | {CLAIM}


class Fingerprint:
    """A digest of teachers and of what is asked of them, made anew when a weight changes.

    Args:
        networks: The teachers.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        self.networks = networks
        self._seen: list[tuple[int, int]] = []
        self._digest = ""

    def current(self, asked: str) -> str:
        """Return the digest of the teachers as they are now.

        Args:
            asked: What else decides their outputs: views, taps, which outputs are kept.

        Returns:
            32 hexadecimal digits.
        """
        tensors = list(_tensors(self.networks))
        # Hashing millions of weights takes longer than a look at their version counters.
        seen = [(tensor.data_ptr(), _version(tensor)) for tensor in tensors]
        if seen != self._seen:
            self._digest, self._seen = self._hashed(tensors), seen
        return hashlib.sha256(f"{self._digest} {asked}".encode()).hexdigest()[:32]

    def _hashed(self, tensors: Sequence[Tensor]) -> str:
        total: Any = hashlib.sha256(torch.__version__.encode())
        for network in self.networks:
            for name, module in network.named_modules():
                total.update(f"{name} {_layer(module)}".encode())
        for tensor in tensors:
            total.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            on_bytes(tensor.flatten().view(torch.uint8), total.update)
        return str(total.hexdigest())


def _layer(module: nn.Module) -> str:
    """A layer without its weights: its class as it is written, its options, hooks of others."""
    own = {name: written(value) for name, value in vars(module).items() if name not in _NO_OPTION}
    hooks = [
        written(hook)
        for table in (module._forward_pre_hooks, module._forward_hooks)  # noqa: SLF001
        for hook in table.values()
        if not type(hook).__module__.startswith("privdistill.")
    ]
    return _ADDRESS.sub("", repr((_source(type(module)), module.extra_repr(), own, hooks)))


def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        # A class of a notebook or of an extension.
        return f"{kind.__qualname__} {written(kind.__dict__.get('forward'))}"


def written(value: Any) -> str:
    """Tell a function or an option from another one, also in another run.

    Args:
        value: Any callable or option.

    Returns:
        Of functions name, code and what they close over; of tensors their numbers; of other
        objects their class and attributes.

    Example:
        >>> written(lambda x: x["out"]) == written(lambda x: x["aux"])
        False
    """
    return _ADDRESS.sub("", repr(_told(value, depth=3)))


def _told(value: Any, depth: int) -> Any:
    code = getattr(value, "__code__", None)
    if isinstance(code, CodeType):
        held = [_told(cell.cell_contents, depth - 1) for cell in value.__closure__ or ()]
        bound = _told(getattr(value, "__self__", None), depth - 1)
        defaults = (value.__defaults__, value.__kwdefaults__)
        return value.__qualname__, _of_code(code), defaults, held, bound
    if isinstance(value, Tensor):
        return tuple(value.shape), value.detach().cpu().tolist()
    if isinstance(value, list | tuple):
        return [_told(part, depth - 1) for part in value] if depth else repr(value)
    if isinstance(value, nn.Module) or not depth or not hasattr(value, "__dict__"):
        return repr(value)
    if isinstance(value, type):
        return value.__qualname__
    parts = {name: _told(part, depth - 1) for name, part in vars(value).items()}
    return type(value).__qualname__, parts, repr(value)


def _of_code(code: CodeType) -> Any:
    """Code without the place where it stands, and sets in one order."""
    constants = [
        _of_code(c)
        if isinstance(c, CodeType)
        else sorted(map(repr, c))
        if isinstance(c, frozenset)
        else repr(c)
        for c in code.co_consts
    ]
    return code.co_code, code.co_names, constants


def _tensors(networks: Sequence[nn.Module]) -> Iterable[Tensor]:
    for network in networks:
        yield from network.parameters()
        yield from network.buffers()


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # noqa: SLF001
