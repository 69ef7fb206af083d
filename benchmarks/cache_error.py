"""What half storage costs: errors of a trained teacher's cached outputs.

Reads a finished run of the application: its teacher, and its preprocessed subjects.

    python examples/brats_kdnet/train.py --out runs/demo
    python benchmarks/cache_error.py runs/demo --json benchmarks/results/cache_error.json
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "brats_kdnet"))

from kdnet.training.checkpoint import load_model
from privdistill import (
    DistillationWrapper,
    GroundTruth,
    LatentKL,
    PrivilegedInput,
    SoftTargetDiceBCE,
    TeacherCache,
)


def subjects(run: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, image (1, M, *grid) and label (1, *grid) of every preprocessed subject."""
    for path in sorted((run / "cache").rglob("*.safetensors")):
        sample = load_file(path)
        yield path.stem, sample["image"][None], sample["label"].long()


def wrapper(run: Path, image: Tensor) -> DistillationWrapper:
    """The run's teacher and student, with a cache that errs."""
    teacher, seen = load_model(run / "units" / "teacher" / "fold0-seed0" / "model.safetensors")
    student, view = load_model(run / "units" / "student" / "fold0-seed0" / "model.safetensors")
    return DistillationWrapper(
        teacher,
        student,
        objective=0.75 * SoftTargetDiceBCE() + 0.25 * GroundTruth() + 10.0 * LatentKL(),
        inputs=PrivilegedInput(seen.modalities, student=view.modalities),
        example=image,
        cache=TeacherCache(storage="half"),
    ).eval()


@torch.no_grad()
def errors(run: Path, count: int) -> dict[str, float]:
    """Largest change of a logit; mean change of the hard targets and of the objective."""
    cases = list(subjects(run))[:count]
    kd = wrapper(run, cases[0][1])
    logits, classes, losses = [], [], []
    for name, image, label in cases:
        kd(image, label, key=[name])
        exact, served = kd(image, label), kd(image, label, key=[name])
        one, other = exact.teacher.argmax(1), served.teacher.argmax(1)
        logits.append((served.teacher - exact.teacher).abs().max().item())
        classes.append(((one != other).sum() / ((one + other) > 0).sum().clamp_min(1)).item())
        losses.append(abs(served.loss.item() / exact.loss.item() - 1))
    return {
        "largest change of a logit": max(logits),
        "foreground voxels of another class, %": 100 * sum(classes) / len(cases),
        "change of the objective, %": 100 * sum(losses) / len(cases),
        "subjects": len(cases),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run folder of train.py")
    parser.add_argument("--subjects", type=int, default=32)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = {"half": errors(options.run, options.subjects)}
    print(", ".join(f"{name} {value:.3g}" for name, value in rows["half"].items()))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
