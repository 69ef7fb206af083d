"""Leave a network as it was found: modes, weights, buffers and random state."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn


def set_mode(model: nn.Module, *, training: bool) -> None:
    """Put a network into train or eval mode; exported programs have flags alone."""
    try:
        model.train(training)
    except NotImplementedError:
        for module in model.modules():
            module.training = training


def modes_of(model: nn.Module) -> dict[nn.Module, bool]:
    """The mode of each module that has one: a program frozen by torch.jit has none."""
    return {m: m.training for m in model.modules() if hasattr(m, "training")}


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Restore a network's modes on leaving, module by module: some may have been set apart."""
    modes = modes_of(model)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Restore a network's modes, weights and buffers, and the random state, on leaving."""
    buffers = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    values = [(t, t.clone()) for t in chain(model.parameters(), model.buffers()) if _writable(t)]
    # Only where the network is: asking for its state would wake another device.
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    try:
        with modes_kept(model), torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        for module, name, buffer in buffers:
            # A forward pass may have replaced the tensor instead of writing into it.
            setattr(module, name, buffer)
        for tensor, value in values:
            # Through `data`, so that nothing that holds the weights takes them for changed.
            tensor.data.copy_(value)


def _writable(tensor: Tensor) -> bool:
    """Whether a forward pass can write into a tensor: not if it is expanded, sharded or packed."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    return plain and not (tensor.is_meta or tensor.is_inference() or 0 in tensor.stride())
