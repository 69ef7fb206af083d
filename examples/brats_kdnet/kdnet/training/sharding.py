"""Weights, gradients and Adam's moments spread over the processes (FSDP2), for large networks.

Files hold whole tensors, so that a run may go on with another strategy or number of processes.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Leave each process its part of the weights; for Fabric's `ModelParallelStrategy`."""
    with torch.no_grad():
        for tensor in chain(model.parameters(), model.buffers()):
            distributed.broadcast(tensor.data, 0)
    every = init_device_mesh(mesh.device_type, (distributed.get_world_size(),))
    # Whole until the backward pass, as one unit has nothing to gain from being gathered twice.
    fully_shard(model, mesh=every, reshard_after_forward=False)
    return model


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Keep the weights whole in the block, so that processes may run forward at their own pace."""
    if not isinstance(model, FSDPModule):
        yield
        return
    for buffer in model.buffers():
        distributed.broadcast(buffer, 0)
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


def whole(value: Any) -> Any:
    """Gather the tensors of a state; all processes must ask."""
    if isinstance(value, DTensor):
        return value.full_tensor().cpu()
    if isinstance(value, dict):
        # A copy keeps what PyTorch notes on a state besides its entries.
        twin = copy.copy(value)
        twin.update({key: whole(item) for key, item in value.items()})
        return twin
    return [whole(item) for item in value] if isinstance(value, list) else value


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give each process its part of whole weights."""
    there, parts = model.state_dict(), copy.copy(weights)
    parts.update({name: _like(value, there.get(name)) for name, value in weights.items()})
    model.load_state_dict(parts)


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Give each process its part of an optimizer's state."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    moments = {
        index: {name: _like(value, weights[index]) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})


def _like(value: Any, other: Any) -> Any:
    """A tensor spread like another of its shape; anything else as it is."""
    if not (isinstance(other, DTensor) and isinstance(value, Tensor)):
        return value
    # An optimizer also counts its steps, which every process does for itself.
    if value.shape != other.shape:
        return value
    return distribute_tensor(value.to(other.device), other.device_mesh, other.placements)
