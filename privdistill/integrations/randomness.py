"""The state of torch's random numbers, to be kept in a checkpoint."""

from collections.abc import Mapping
from typing import Any

import torch


def random_state() -> dict[str, Any]:
    """Return the state of the CPU and of every CUDA device in use."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: Mapping[str, Any]) -> None:
    """Go on from a state, on as many devices as there are.

    Args:
        state: What `random_state` gave.
    """
    torch.set_rng_state(state["cpu"].cpu())
    for device, values in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(values.cpu(), device)
