"""How many units are trained at a time."""

import os

import torch

from kdnet.errors import UserError

_LARGEST_ON_CPU = 4


def number_of_jobs(wanted: int | str, accelerator: str) -> int:
    """Say how many units to train at a time."""
    if isinstance(wanted, int):
        if wanted < 1:
            raise UserError(f"--jobs is {wanted}; expected 1 or more, or auto.")
        return wanted
    if accelerator in {"auto", "gpu", "cuda"} and torch.cuda.is_available():
        return torch.cuda.device_count()
    return min(_LARGEST_ON_CPU, processors())


def processors() -> int:
    """Return how many processors this process may use; a cluster's job gets a part of them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
