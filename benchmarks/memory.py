"""Peak memory of one piece of work, in a process of its own.

python benchmarks/memory.py step 48               a distillation step on a patch of 48^3
python benchmarks/memory.py predict MODEL IMAGE...  what predict.py does for one case
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from network import USUAL, make_world
from steps import by_wrapper, objective


def peak_growth(work: Callable[[], object]) -> float:
    """Growth of this process's memory to its peak during some work, in MiB; Linux alone."""
    # "5" sets the peak back to what is held now.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = kibibytes("VmRSS")
    work()
    return (kibibytes("VmHWM") - before) / 1024


def kibibytes(field: str) -> int:
    """Read one line of this process's status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def in_fresh_process(script: str, *arguments: str, threads: int) -> float:
    """Run a script and return the number that it prints at last, MiB."""
    command = [sys.executable, script, *arguments]
    # Memory that is freed goes back at once, so that the peak is that of what is in use.
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": str(threads)}
    environment = os.environ | settings
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed: {done.stderr[-2000:]}")
    return float(done.stdout.splitlines()[-1])


def distillation_step(size: int) -> float:
    """Two steps of the wrapper on a patch, MiB; libraries are loaded by a small step before."""
    by_wrapper(make_world(16, USUAL[1], batch=1), objective()).step()
    contestant = by_wrapper(make_world(size, USUAL[1], batch=1), objective())

    def two_steps() -> None:
        contestant.step()
        contestant.step()

    return peak_growth(two_steps)


def prediction(model: str, images: Sequence[str]) -> float:
    """One case from its files to its label map, MiB."""
    from application import segment  # noqa: PLC0415  the application takes seconds to import

    with tempfile.TemporaryDirectory() as folder:
        return peak_growth(lambda: segment(Path(model), images, Path(folder)))


def main(arguments: Sequence[str]) -> None:
    """Print MiB."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    kind, first, *others = arguments
    print(distillation_step(int(first)) if kind == "step" else prediction(first, others))


if __name__ == "__main__":
    main(sys.argv[1:])
