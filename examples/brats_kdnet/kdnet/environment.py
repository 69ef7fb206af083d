"""What a run was made with: versions, revision of the code, hardware."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch

_PACKAGES = (
    *("privdistill", "torch", "monai", "lightning-fabric", "nibabel", "numpy", "safetensors"),
    "scipy",
)


@cache
def versions() -> dict[str, str]:
    """Return the installed version of every package that can change a result."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def environment() -> dict[str, Any]:
    """Return versions, revision of the code and hardware, JSON-safe."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": versions(),
        "git_revision": git_revision(),
        "platform": platform.platform(),
        "processors": processors(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }


def processors() -> int:
    """Return how many processors this process may use; a cluster's job gets a part of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def git_revision() -> str | None:
    """Return the revision of the code, "-dirty" if files were changed; None outside git."""
    git = shutil.which("git")
    if git is None:
        return None
    command = [git, "-C", str(Path(__file__).parent)]
    command += ["describe", "--always", "--dirty", "--abbrev=40"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    return result.stdout.strip() or None
