"""Which teacher an output came from."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from privdistill.cache.entries import on_bytes

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


class Fingerprint:
    """A digest of teachers and of what is asked of them, made anew when a weight changes.

    Args:
        networks: The teachers.
        description: What else decides their outputs: views, taps, which outputs are kept.
    """

    def __init__(self, networks: Sequence[nn.Module], description: str) -> None:
        self.networks = networks
        self.description = description
        self._seen: list[tuple[int, int]] = []
        self._digest = ""

    def current(self) -> str:
        """Return the digest of the weights as they are now.

        Returns:
            32 hexadecimal digits.
        """
        tensors = list(_tensors(self.networks))
        # Hashing millions of weights takes longer than a look at their version counters.
        seen = [(tensor.data_ptr(), _version(tensor)) for tensor in tensors]
        if seen != self._seen:
            self._digest, self._seen = self._hashed(tensors), seen
        return self._digest

    def _hashed(self, tensors: Sequence[Tensor]) -> str:
        total: Any = hashlib.sha256(f"{torch.__version__} {self.description}".encode())
        for network in self.networks:
            kinds = dict.fromkeys(type(module) for module in network.modules())
            text = (repr(network), [written(kind.forward) for kind in kinds])
            total.update(_ADDRESS.sub("", repr(text)).encode())
        for tensor in tensors:
            total.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            on_bytes(tensor.flatten().view(torch.uint8), total.update)
        return str(total.hexdigest()[:32])


def written(function: Any) -> str:
    """Tell a function from one that does something else, also in another run.

    Args:
        function: Any callable.

    Returns:
        Its name, its code and what it closes over; of other callables what they print.

    Example:
        >>> written(lambda x: x["out"]) == written(lambda x: x["aux"])
        False
    """
    code = getattr(function, "__code__", None)
    if code is None:
        return _ADDRESS.sub("", repr(function))
    held = [cell.cell_contents for cell in function.__closure__ or ()]
    parts = (function.__qualname__, code.co_code, code.co_consts, code.co_names)
    return _ADDRESS.sub("", repr((*parts, function.__defaults__, held)))


def _tensors(networks: Sequence[nn.Module]) -> Iterable[Tensor]:
    for network in networks:
        for tensor in (*network.parameters(), *network.buffers()):
            # Of a teacher sharded by FSDP each process knows its own part.
            yield tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # noqa: SLF001
