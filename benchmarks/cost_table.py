"""The tables of docs/performance/scaling.md: measured costs of a subject, multiplied.

python benchmarks/cost_table.py
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "docs" / "performance"
COHORTS = (285, 1_251, 100_000)
TRAINED, VALIDATED = 2 / 3 * 0.85, 2 / 3 * 0.15  # of three folds, with a validation share of 15 %
GRID, CLASSES, FLIPS = 64**3, 4, 8
#: Epochs, and numbers in the bottleneck of a sample: widest level x 4^3 voxels.
PRESETS = {"cpu": (100, 128 * 4**3), "paper": (500, 480 * 4**3)}


def per_subject(costs: Mapping[str, Any], subjects: int) -> list[str]:
    """What does not depend on the network, with one core: reading twice, disk, scoring."""
    once = subjects * (costs["check_seconds"] + costs["prepare_seconds"])
    networks, folds = 3, 3
    scoring = networks * subjects / folds * costs["score_seconds"]
    return [duration(once), size(subjects * costs["cache_bytes"]), duration(scoring)]


def training(costs: Mapping[str, Any], preset: str, subjects: int) -> list[str]:
    """Of a fold's teacher and student: one epoch of the student, and the whole."""
    epochs, _ = PRESETS[preset]
    steps = math.ceil(subjects * TRAINED / costs["batch_size"])
    step = costs["chosen"]
    student = steps * step["student_step_seconds"]
    times = (student, epochs * steps * step["teacher_step_seconds"], epochs * student)
    return [duration(time) for time in times]


def teacher_cache(preset: str, subjects: int) -> list[str]:
    """Logits and bottleneck of a fold, every flip for training and one for validation."""
    numbers = CLASSES * GRID + PRESETS[preset][1]
    entries = round(subjects * TRAINED) * FLIPS + round(subjects * VALIDATED)
    return [f"{entries:,}", *(size(entries * numbers * width) for width in (4, 2))]


def duration(seconds: float) -> str:
    for unit, length in (("years", 31_557_600), ("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.0f} s"


def size(count: float) -> str:
    unit, length = ("TB", 1e12) if count >= 1e12 else ("GB", 1e9)
    return f"{count / length:,.1f} {unit}"


def table(head: str, rows: Mapping[str, list[str]]) -> str:
    columns = head.count("|") + 1
    lines = [f"| {head} |", "| --- |" + " ---: |" * (columns - 1)]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(row)} |" for name, row in rows.items())])


def tables() -> list[str]:
    costs = {name: json.loads((FOLDER / f"costs-{name}.json").read_text()) for name in PRESETS}
    both = [(preset, number) for preset in PRESETS for number in COHORTS]
    return [
        table(
            "subjects | check and preprocess | preprocessed cache | scoring, one fold",
            {f"{number:,}": per_subject(costs["cpu"], number) for number in COHORTS},
        ),
        table(
            "preset, subjects | epoch of the student | teacher, one fold | student, one fold",
            {f"{name}, {n:,}": training(costs[name], name, n) for name, n in both},
        ),
        table(
            "preset, subjects | entries | fp32 | fp16",
            {f"{name}, {n:,}": teacher_cache(name, n) for name, n in both},
        ),
    ]


if __name__ == "__main__":
    print("\n\n".join(tables()))
