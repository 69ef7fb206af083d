"""What a subject costs in the reference application: preparing, loading, training, scoring, disk.

docs/performance/scaling.md multiplies these numbers. One process with one thread, unless said
otherwise; a time is the shortest of several, so that a busy machine shows as little as possible.

    python benchmarks/costs.py --preset demo
    python benchmarks/costs.py --preset cpu --data-root BraTS2021
    python benchmarks/costs.py --preset paper --data-root BraTS2021 --steps 1
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples" / "brats_kdnet"))

from kdnet.config import Config, parse_config  # noqa: E402
from kdnet.data.checks import check_subjects  # noqa: E402
from kdnet.data.description import Description  # noqa: E402
from kdnet.data.loading import build_loader, prepare, start_epoch  # noqa: E402
from kdnet.data.subjects import Subject, find_subjects  # noqa: E402
from kdnet.data.targets import to_target  # noqa: E402
from kdnet.evaluation.scoring import evaluate  # noqa: E402
from kdnet.recipes import recipe_of  # noqa: E402
from kdnet.rows import Row  # noqa: E402
from kdnet.runs.networks import build, describe_network, setting_of, stacked, wrapped  # noqa: E402
from kdnet.training.runtime import measure_steps, peak_memory, torch_format  # noqa: E402
from phantoms import generate_phantoms  # noqa: E402
from privdistill import DistillationWrapper  # noqa: E402

Step = Callable[[dict[str, Any]], None]
ROWS = (
    Row("teacher", role="teacher"),
    Row("baseline"),
    Row("student", recipe="distilled", teacher="teacher"),
)


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def preparing(
    config: Config, description: Description, subjects: list[Subject], cache: Path
) -> tuple[dict[str, Any], Any]:
    """Check and preprocess with one thread and with all, in turns."""
    preprocessing = describe_network("teacher", config, description).preprocessing()

    def fill(workers: int, number: int) -> Any:
        return prepare(subjects, preprocessing, cache / str(number), workers, progress=False)

    cores = os.cpu_count() or 1
    check = seconds(lambda: check_subjects(description, subjects, workers=1, progress=False))
    turns = [
        [seconds(lambda w=w, i=i: fill(w, 2 * i + (w > 1))) for w in (1, cores)] for i in (0, 1)
    ]
    one, every = (min(times) / len(subjects) for times in zip(*turns, strict=True))
    dataset = fill(1, 0)
    files = [file.stat().st_size for file in (cache / "0").rglob("*.safetensors")]
    return {
        "check_seconds": check / len(subjects),
        "prepare_seconds": one,
        "prepare_seconds_all_cores": every,
        "cores": cores,
        "cache_bytes": max(files),
        "raw_bytes": sum(raw_size(subject) for subject in subjects) / len(subjects),
    }, dataset


def raw_size(subject: Subject) -> int:
    files = {image.path for image in subject.images.values()}
    return sum(path.stat().st_size for path in files)


@dataclass(frozen=True)
class Performance:
    """One way to take a training step."""

    precision: str = "32-true"
    memory_format: str = "contiguous"


def step_of(
    config: Config, description: Description, row: Row, way: Performance
) -> tuple[Step, DistillationWrapper]:
    """The step of the application's loop, without Fabric around it."""
    metadata = describe_network(row.role, config, description)
    network = build(metadata).to(memory_format=torch_format(way.memory_format))
    teachers = [build(describe_network("teacher", config, description)) for _ in row.teachers]
    recipe = recipe_of(row, setting_of(row, config, description, network, teachers))
    kd = wrapped(recipe, metadata, stacked(config.data, description))
    optimizer = torch.optim.Adam(kd.parameters(), lr=1e-4)

    def step(batch: dict[str, Any]) -> None:
        image = batch["image"].to(memory_format=torch_format(way.memory_format))
        target = to_target(batch["label"], description, metadata.activation)
        with torch.autocast("cpu", torch.bfloat16, enabled=way.precision == "bf16-mixed"):
            loss = kd(image, target).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, kd


def shortest_step(step: Step, batch: dict[str, Any], steps: int) -> float:
    step(batch)
    return min(seconds(lambda: step(batch)) for _ in range(steps))


def loading(loader: Any, step: Step, rounds: int) -> dict[str, float]:
    """An epoch from the cache against its steps alone, on batches that are there already."""
    held = list(loader)

    def from_cache(epoch: int) -> None:
        start_epoch(loader, epoch)
        for batch in loader:
            step(batch)

    def alone() -> None:
        for batch in held:
            step(batch)

    alone()
    pairs = [(seconds(lambda e=e: from_cache(e)), seconds(alone)) for e in range(rounds)]
    loads = min(seconds(lambda: list(loader)) for _ in range(rounds + 2))
    return {
        "loader_seconds": loads / len(loader),
        "loader_share_of_step": loads / min(steps for _, steps in pairs),
        "epoch_to_steps_alone": statistics.median(whole / steps for whole, steps in pairs),
    }


def measure(
    config: Config, description: Description, subjects: list[Subject], cache: Path, options: Any
) -> dict[str, Any]:
    torch.manual_seed(0)
    found, dataset = preparing(config, description, subjects, cache)
    found = {"preset": config.run.preset, "subjects": len(subjects), **found}
    loader = build_loader(
        dataset, config.training.batch_size, shuffle=True, seed=0, flips=True, workers=0
    )
    batch = next(iter(loader))
    student = describe_network("student", config, description)
    shape = (config.training.batch_size, student.in_channels, *student.input_size)
    measured = measure_steps(build(student), shape, "cpu")
    found["trial_seconds"] = {", ".join(way): seconds for way, seconds in measured.items()}
    way = Performance(*next(iter(measured)))
    for name, chosen in (("plain", Performance()), ("chosen", way)):
        steps = {row.name: step_of(config, description, row, chosen) for row in ROWS}
        found[name] = asdict(chosen) | {
            f"{row}_step_seconds": shortest_step(step, batch, options.steps)
            for row, (step, _) in steps.items()
        }
    step, kd = steps["student"]
    found |= loading(loader, step, options.rounds)
    found["training_peak_mib"] = peak_memory()["process"]
    scoring = seconds(
        lambda: evaluate(
            lambda image: kd.predict(image.to(memory_format=torch_format(way.memory_format))),
            subjects[:2],
            student.preprocessing(),
            student.activation,
            unit={"row": "student"},
        )
    )
    weights = sum(p.numel() for p in kd.student.parameters())
    return found | {
        "batch_size": config.training.batch_size,
        "score_seconds": scoring / 2,
        "student_weights": weights,
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--data-root", type=Path, help="phantoms if none is given")
    parser.add_argument("--subjects", type=int, default=6)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = options.data_root or generate_phantoms(
            Path(folder) / "phantoms", subjects=options.subjects, seed=0, size=64, progress=False
        )
        # Augmented samples do not come back, and a cache before their teacher would cost alone.
        plain = ["--augment", "false", "--activation", "softmax", "--labelled", "null"]
        config = parse_config(["--preset", options.preset, "--data-root", str(root), *plain])
        description, every = find_subjects(root)
        subjects = every[: options.subjects]
        found = measure(config, description, subjects, Path(folder) / "cache", options)
    out = options.out or ROOT / "docs" / "performance" / f"costs-{options.preset}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=2) + "\n")
    Console(highlight=False).print_json(data=found)


if __name__ == "__main__":
    main()
