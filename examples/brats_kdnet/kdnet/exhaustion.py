"""What the machine did not give: memory, a loading process, an answer in time; and what to change.

PyTorch and the operating system report most of it as a `RuntimeError` with a text. The texts below
are those of PyTorch 2.14: torch/utils/data/dataloader.py, c10/core/impl/alloc_cpu.cpp and
c10/cuda/CUDACachingAllocator.cpp.
"""

import errno
import re
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

import torch

from kdnet.errors import UserError

_RESUME = "Finished epochs are kept: the same command goes on after the last of them"
_SMALLER = (
    "lower --batch_size, choose a smaller --patch or --grid, or --precision bf16-mixed where the "
    "device has it. These make another experiment: choose a new --out"
)
_GPU = (
    f"The GPU's memory was not enough. If another process uses it (nvidia-smi), wait or choose "
    f"another GPU with CUDA_VISIBLE_DEVICES, and start with fewer --jobs if there are several. "
    f"Otherwise {_SMALLER}. {_RESUME}."
)
_CPU = (
    "Main memory was not enough. Lower --workers, keep the teacher's outputs in files with "
    "--teacher_cache disk, or in less room with --teacher_cache_storage half and "
    "--teacher_cache_gib, and start with fewer --jobs if there are several. Otherwise "
    f"{_SMALLER}. {_RESUME}."
)
_SHARED = (
    "A process that loads data found no room in shared memory (/dev/shm). Start the container with "
    f"more of it (docker run --shm-size 8g, or --ipc host), or lower --workers. {_RESUME}."
)
_KILLED = (
    "A process that loads data was killed. The kernel does that to the largest process when memory "
    "runs out (dmesg tells), and a cluster when a job uses more than it asked for. Lower "
    f"--workers, or ask for more memory. {_RESUME}, with fewer --workers if given."
)
_DIED = (
    "A process that loads data ended by itself. Lower --workers; if it happens again, "
    "check_data.py reads every file once and names those that cannot be read. "
    f"{_RESUME}."
)
_SLOW = (
    "A process that loads data gave nothing for so long that it must hang. Look whether the "
    "folders of --data_root and --cache_dir can be read now (a network drive may have gone), copy "
    f"the data to a local disk, or lower --workers. {_RESUME}."
)
_KINDS = (
    (r"DataLoader timed out", _SLOW),
    (r"out of shared memory|Bus error", _SHARED),
    (r"DataLoader worker .* killed by signal", _KILLED),
    (r"DataLoader worker .* exited unexpectedly|Pin memory thread exited", _DIED),
    (r"MemoryError|can't allocate memory|DefaultCPUAllocator|Cannot allocate memory", _CPU),
    (r"out of memory|CUDNN_STATUS_ALLOC_FAILED|CUBLAS_STATUS_ALLOC_FAILED", _GPU),
)
_SHOWN = 300


class ExhaustedError(UserError):
    """The machine did not give what the run needed."""


def explain(error: BaseException) -> str | None:
    """Say what an error means for the run, if the machine is its cause."""
    kind = _kind(error)
    if kind is None:
        return None
    # What a loading process raised arrives with its traceback, of which the last line is the error.
    lines = _text(error).strip().splitlines() or [type(error).__name__]
    words = lines[-1] if "Original Traceback" in str(error) else " ".join(lines)
    return f"{kind}\nReported: {words[:_SHOWN]}"


def _kind(error: BaseException) -> str | None:
    if isinstance(error, torch.OutOfMemoryError):
        return _GPU
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return _CPU
    if isinstance(error, BrokenProcessPool):
        return _KILLED
    if not isinstance(error, RuntimeError):
        return None
    return next((kind for pattern, kind in _KINDS if re.search(pattern, _text(error))), None)


def _text(error: BaseException) -> str:
    """The error's words, with those of its cause: a lost process is told of in both."""
    cause = error.__cause__
    return f"{error} ({cause})" if isinstance(cause, RuntimeError) else str(error)


@contextmanager
def explained(doing: str) -> Iterator[None]:
    """Raise what the machine causes as an error that says so."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        reason = explain(error)
        if reason is None:
            raise
        raise ExhaustedError(f"{doing} stopped. {reason}") from error
