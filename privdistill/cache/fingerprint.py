"""Which teacher an output came from."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from privdistill.cache.entries import on_bytes


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
        total: Any = hashlib.sha256(self.description.encode())
        for network in self.networks:
            total.update(repr(network).encode())
        for tensor in tensors:
            total.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            on_bytes(tensor.flatten().view(torch.uint8), total.update)
        return str(total.hexdigest()[:32])


def _tensors(networks: Sequence[nn.Module]) -> Iterable[Tensor]:
    for network in networks:
        for tensor in (*network.parameters(), *network.buffers()):
            # Of a teacher sharded by FSDP each process has a part.
            yield tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # noqa: SLF001
