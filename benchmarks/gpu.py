"""Steps on a GPU: what the wrapper adds to one, and what the teacher's cache saves or costs there.

    python benchmarks/gpu.py                 half a minute on a CUDA device; writes results/gpu.json

The networks have the widths of the paper preset, batch 2, 64^3 voxels. On a GPU a teacher's forward
pass is short, and what a cache reads and writes has to cross to the CPU and back.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from statistics import median

import torch

from contest import race
from network import World, make_world
from privdistill import DistillationWrapper, GroundTruth, PrivilegedInput, TeacherCache
from steps import (
    ADAM,
    MODALITIES,
    by_hand,
    by_wrapper,
    finish,
    objective,
    plain_objective,
    wrapped,
)

WIDTHS = (30, 60, 120, 240, 480)
SIZE, ROUNDS = 64, 30
RESULTS = Path(__file__).parent / "results" / "gpu.json"

Step = Callable[[], object]


def world_on(device: str) -> World:
    """Networks and batch on the device."""
    world = make_world(SIZE, WIDTHS)
    return World(*(part.to(device) for part in vars(world).values()))


def supervised(world: World) -> Step:
    """The student learns from the reference alone."""
    inputs = PrivilegedInput(MODALITIES, student=MODALITIES[:1])
    kd = DistillationWrapper(
        None, world.student, objective=GroundTruth(), inputs=inputs, activation="sigmoid"
    )
    optimizer = torch.optim.Adam(kd.parameters(), **ADAM)
    return lambda: finish(kd(world.image, world.target).loss, optimizer)


def missing(world: World, cache: TeacherCache) -> Step:
    """Every step brings subjects that the cache has not seen."""
    kd = wrapped(world, objective(), cache)
    optimizer = torch.optim.Adam(kd.parameters(), **ADAM)
    names: Iterator[int] = count()

    def step() -> object:
        key = [f"case{next(names)}" for _ in range(len(world.image))]
        return finish(kd(world.image, world.target, key=key).loss, optimizer)

    return step


def contestants(folder: Path, device: str) -> dict[str, Step]:
    """All steps, by what the table calls them."""

    def world() -> World:
        return world_on(device)

    there = {"served": folder / "served", "missed": folder / "missed"}
    disk = {name: TeacherCache(path) for name, path in there.items()}
    usual = {
        "teacher in every step, by hand": by_hand(world()),
        "the same, wrapper": by_wrapper(world(), plain_objective()),
        "the library's terms": by_wrapper(world(), objective()),
        "served from memory": by_wrapper(world(), objective(), cache=TeacherCache()),
        "served from disk": by_wrapper(world(), objective(), cache=disk["served"]),
    }
    steps: dict[str, Step] = {name: contestant.step for name, contestant in usual.items()}
    steps["kept in memory"] = missing(world(), TeacherCache())
    steps["kept on disk"] = missing(world(), disk["missed"])
    return {"supervised, no teacher": supervised(world())} | steps


def waited_for(step: Step, half: torch.dtype | None) -> Step:
    """A step that ends when the GPU has done it."""

    def run() -> None:
        with torch.autocast("cuda", dtype=half, enabled=half is not None):
            step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run


def measure(half: torch.dtype | None, device: str) -> dict[str, float]:
    """Median milliseconds of each step in float32, or under autocast."""
    with tempfile.TemporaryDirectory() as folder:
        steps = contestants(Path(folder), device)
        times = race({name: waited_for(step, half) for name, step in steps.items()}, ROUNDS)
    return {name: round(1000 * median(seconds), 2) for name, seconds in times.items()}


def main() -> int:
    """Measure in both precisions, print and write."""
    if not torch.cuda.is_available():
        print("Skipped: PyTorch finds no CUDA device on this machine.")
        return 0
    found = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "rounds": ROUNDS,
        "milliseconds": {
            "32-true": measure(None, "cuda"),
            "bf16-mixed": measure(torch.bfloat16, "cuda"),
        },
    }
    text = json.dumps(found, indent=2)
    print(text)
    RESULTS.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
