"""What the state of a training must hold, whoever wrote it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor


def misfits(state: Mapping[Any, Any]) -> list[str]:
    """Return the names of what a state lacks, or has in another form."""
    needed = ["epoch", "finished"]
    if state.get("finished") is not True:
        needed += ["step", "best", "weights", "optimizer", "scheduler", "precision", "random"]
    if "batch" in state or "means" in state:
        needed += ["batch", "steps", "seconds", "means"]
    optional = [name for name in ("network", "files") if name in state]
    return [
        name for name in (*needed, *optional) if name not in state or not _FORMS[name](state[name])
    ]


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    return type(value) in {int, float}


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _are_weights(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items()
    )


def _are_files(value: Any) -> bool:
    # They are looked for beside the state, and nowhere else.
    return isinstance(value, dict) and all(
        isinstance(name, str) and Path(name).name == name and isinstance(digest, str)
        for name, digest in value.items()
    )


def _are_means(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    names, packed = value.get("names"), value.get("packed")
    return (
        isinstance(names, list)
        and all(isinstance(name, str) for name in names)
        and isinstance(packed, Tensor)
        and packed.ndim == 3
        and packed.shape[1:] == (2, len(names))
    )


def _is_random(value: Any) -> bool:
    """Of every process a row for each of both; in old files the CPU's alone and a list of GPUs."""
    if not isinstance(value, dict) or not isinstance(value.get("cpu"), Tensor):
        return False
    if "cuda" in value:
        every = value["cuda"]
        return isinstance(every, list) and all(isinstance(one, Tensor) for one in every)
    gpu = value.get("gpu")
    return (
        isinstance(gpu, Tensor)
        and gpu.ndim == value["cpu"].ndim == 2
        and 1 <= len(gpu) == len(value["cpu"])
    )


_FORMS: dict[str, Callable[[Any], bool]] = {
    "finished": lambda value: type(value) is bool,
    "network": lambda value: isinstance(value, str),
    "epoch": _is_count,
    "step": _is_count,
    "best": _is_number,
    "weights": _are_weights,
    "optimizer": _is_mapping,
    "scheduler": _is_mapping,
    "precision": _is_mapping,
    "random": _is_random,
    "files": _are_files,
    "batch": _is_count,
    "steps": _is_count,
    "seconds": _is_number,
    "means": _are_means,
}
