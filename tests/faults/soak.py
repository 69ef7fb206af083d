"""Does a long training keep anything it should give back?

    python tests/faults/soak.py                         2,000 steps, about half a minute
    python tests/faults/soak.py --write docs/soak.json  the same, and the page's numbers anew

After 1,000 steps, in which allocators and caches reach their size, a tiny network is distilled
for 2,000 more with everything that a training does: a validation, a
checkpoint, a row of history and TensorBoard events after every 20 steps, and a teacher's cache on
disk. At every step the resident memory, open files, hooks and threads of the process are noted.
"""

import argparse
import gc
import json
import platform
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from lightning_fabric import Fabric
from scipy.stats import linregress, t

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "brats_kdnet"), str(ROOT / "tests")]

from faulty_training import GRID, MODALITIES, Network, Samples, case
from kdnet.config import TrainingConfig
from kdnet.data.loading import build_loader
from kdnet.training.loop import fit
from privdistill import (
    DistillationWrapper,
    FeatureL2,
    GroundTruth,
    HintonKL,
    PrivilegedInput,
    Tap,
    TeacherCache,
)

STEPS_PER_EPOCH = 20
BATCH = 2
WARM_UP = 1000
BLOCKS = 30
MIB = 2**20
PAGE = 4096


class Watched(Samples):
    """Samples that note what the process holds whenever the first of a batch is read."""

    def __init__(self, count, steps):
        super().__init__(count)
        # Made beforehand: notes that grow would be found to grow.
        self.noted = np.zeros((steps, 4), dtype=np.int64)
        self.reads, self.networks = 0, []

    def __getitem__(self, index):
        if self.reads % BATCH == 0:
            self.noted[self.reads // BATCH] = held(self.networks)
        return super().__getitem__(index)


def held(networks):
    """What this process holds: resident bytes, open files, hooks, threads."""
    resident = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * PAGE
    files = sum(1 for _ in Path("/proc/self/fd").iterdir())
    hooks = sum(
        len(table)
        for network in networks
        for module in network.modules()
        for name, table in vars(module).items()
        if name.startswith("_") and name.endswith("hooks") and hasattr(table, "values")
    )
    return resident, files, hooks, threading.active_count()


def slope(values, steps):
    """Least-squares slope per 1,000 steps with its 95 % interval.

    Neighbouring steps are alike: the line goes through means of blocks, which are far enough apart
    to count as independent. The interval is Student's, with two degrees less than blocks.
    """
    if len(set(values)) == 1:
        return [0.0, 0.0, 0.0]
    blocks = np.array_split(np.asarray(values, dtype=float), BLOCKS)
    centres = [block.mean() for block in np.array_split(np.asarray(steps, dtype=float), BLOCKS)]
    line = linregress(centres, [block.mean() for block in blocks])
    half = t.ppf(0.975, BLOCKS - 2) * line.stderr
    return [1000 * line.slope, 1000 * (line.slope - half), 1000 * (line.slope + half)]


def soak(folder, steps=2000, warm_up=WARM_UP):
    """Train for a number of steps after some others; what was held, with slopes per 1,000 steps."""
    torch.manual_seed(0)
    epochs = (warm_up + steps) // STEPS_PER_EPOCH
    samples = Watched(STEPS_PER_EPOCH * BATCH, epochs * STEPS_PER_EPOCH)
    loaders = [
        build_loader(dataset, BATCH, shuffle=shuffle, seed=3, flips=shuffle, workers=0)
        for dataset, shuffle in ((samples, True), (Samples(4), False))
    ]
    settings = TrainingConfig(epochs=epochs, batch_size=BATCH, schedule="plateau")
    work = replace(case(Path(folder)), settings=settings)
    cache = TeacherCache(Path(folder) / "teacher")
    started = time.perf_counter()
    with DistillationWrapper(
        Network(4),
        Network(1),
        objective=GroundTruth() + HintonKL() + FeatureL2("norm"),
        taps={"norm": Tap("norm", "norm")},
        example=torch.zeros(1, 4, *GRID),
        inputs=PrivilegedInput(MODALITIES, student=("t1ce",)),
        cache=cache,
    ) as kd:
        samples.networks += [kd.student, kd.teacher]
        fit(Fabric(accelerator="cpu", devices=1), kd, *loaders, work)
    gc.collect()
    numbers = samples.noted
    memory, files, hooks, threads = numbers[warm_up:].T
    at = np.arange(warm_up, len(numbers))
    return {
        "steps": len(at),
        "after_steps": warm_up,
        "validations": epochs,
        "checkpoints": epochs,
        "cache_hits": cache.statistics.hits,
        "seconds": round(time.perf_counter() - started, 1),
        "resident_mib": [round(float(memory[0]) / MIB, 1), round(float(memory[-1]) / MIB, 1)],
        "memory_mib_per_1000_steps": [round(v / MIB, 3) for v in slope(memory, at)],
        "open_files": [int(files.min()), int(files.max())],
        "open_files_per_1000_steps": [round(v, 4) for v in slope(files, at)],
        "hooks": [int(hooks.min()), int(hooks.max())],
        "threads": [int(threads.min()), int(threads.max())],
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}, CPU",
    }


def main():
    """Read the command line, run, and show the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--write", type=Path, help="file for the numbers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = soak(folder, options.steps)
    text = json.dumps(found, indent=1) + "\n"
    sys.stdout.write(text)
    if options.write is not None:
        options.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
