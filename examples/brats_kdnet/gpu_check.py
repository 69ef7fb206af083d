"""Run the paper preset for 50 steps on a GPU: compile off and on, peak memory, kill and resume.

    python examples/brats_kdnet/gpu_check.py

Phantoms of 128^3 stand in for subjects, so that crop and grid are the paper's. Without a GPU the
check says that it is skipped, and succeeds.
"""

import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file

from kdnet.training.history import read_history

_TRAIN = Path(__file__).with_name("train.py")
# Of 24 phantoms in 3 folds, 10 train (and 6 validate): 5 steps of batch 2 in each of 10 epochs.
_EPOCHS, _STEPS = 10, 50
_ARGUMENTS = (
    *("--preset", "paper", "--phantoms", "24", "--phantom_size", "128", "--epochs", str(_EPOCHS)),
    *("--crop", "128,128,128", "--grid", "64,64,64", "--validation_fraction", "0.375"),
    *("--accelerator", "gpu", "--predictions", "false", "--compile", "false"),
)


def train(out: Path, cache: Path, *flags: str) -> subprocess.Popen[bytes]:
    """Start a training."""
    command = [
        sys.executable,
        str(_TRAIN),
        *_ARGUMENTS,
        "--out",
        str(out),
        "--cache_dir",
        str(cache),
    ]
    return subprocess.Popen([*command, *flags])  # noqa: S603


def finish(process: subprocess.Popen[bytes], expected: int = 0) -> None:
    """Wait for a training."""
    status = process.wait()
    if status != expected:
        raise SystemExit(f"GPU check failed: train.py ended with status {status}, not {expected}.")


def measure(out: Path, console: Console) -> None:
    """Print step time and peak memory of a finished training."""
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    resolved = json.loads((out / "environment.json").read_text(encoding="utf-8"))["resolved"]
    for role in ("teacher", "baseline", "student"):
        rows = read_history(out / role / "history.csv")
        if rows[-1]["step"] != _STEPS:
            raise SystemExit(
                f"GPU check failed: {role} took {rows[-1]['step']} steps, not {_STEPS}."
            )
        # The first epoch compiles and tries out kernels.
        seconds = sum(row["seconds"] for row in rows[1:]) / (_EPOCHS - 1)
        console.print(f"  {role}: {seconds:.2f} s per epoch of {_STEPS // _EPOCHS} steps")
    console.print(f"  peak memory (MiB): {summary['peak_mib']}; {resolved}")


def kill_and_resume(out: Path, cache: Path) -> None:
    """Stop a training with SIGTERM in the middle, and let it go on."""
    process = train(out, cache)
    while process.poll() is None and not (out / "teacher" / "state.safetensors").is_file():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    finish(process, 128 + signal.SIGTERM)
    finish(train(out, cache))


def largest_difference(first: Path, second: Path) -> float:
    """Return the largest difference between the weights of two students."""
    weights, others = (load_file(run / "student" / "last.safetensors") for run in (first, second))
    return max(float((weights[name] - others[name]).abs().max()) for name in weights)


def main() -> int:
    """Run the check."""
    console = Console(highlight=False, soft_wrap=True)
    if not torch.cuda.is_available():
        console.print("GPU check skipped: PyTorch finds no CUDA device on this machine.")
        return 0
    console.print(f"GPU check on {torch.cuda.get_device_name()}, phantom subjects")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        cache = root / "cache"
        for name, flags in (("eager", ()), ("compiled", ("--compile", "true"))):
            finish(train(root / name, cache, *flags))
            console.print(f"{name}:")
            measure(root / name, console)
        kill_and_resume(root / "resumed", cache)
        measure(root / "resumed", console)
        difference = largest_difference(root / "eager", root / "resumed")
        console.print(
            f"killed and resumed: largest difference of a weight to the uninterrupted run "
            f"{difference:.2g} (a GPU adds in an order of its own, so it need not be zero)"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
