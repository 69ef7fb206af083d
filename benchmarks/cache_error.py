"""What narrow storage and shared flips cost: errors of a trained teacher's cached outputs.

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
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "brats_kdnet"))

from privdistill import DistillationWrapper, GroundTruth, LatentKL, SoftTargetDiceBCE, TeacherCache
from training.checkpoint import load_model

KINDS = {
    "half": {"storage": "half"},
    "8bit": {"storage": "8bit"},
    "share_flips": {"share_flips": True},
}


def subjects(run: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, image (1, M, *grid) and label (1, *grid) of every preprocessed subject."""
    for path in sorted((run / "cache").glob("*/*.pt")):
        sample = torch.load(path, weights_only=True)
        yield sample["name"], sample["image"][None].as_subclass(Tensor), sample["label"].long()


def wrapper(teacher: nn.Module, cache: TeacherCache | None, image: Tensor) -> DistillationWrapper:
    torch.manual_seed(0)
    student, _ = load_model(ARGUMENTS.run / "teacher" / "model.safetensors")
    return DistillationWrapper(
        teacher,
        student,
        objective=0.75 * SoftTargetDiceBCE() + 0.25 * GroundTruth() + 10.0 * LatentKL(),
        example=image,
        cache=cache,
    ).eval()


@torch.no_grad()
def errors(kind: str) -> dict[str, float]:
    """Mean change of the objective and of the hard targets, largest change of a logit."""
    teacher, _ = load_model(ARGUMENTS.run / "teacher" / "model.safetensors")
    cases = list(subjects(ARGUMENTS.run))[: ARGUMENTS.subjects]
    cached = wrapper(teacher, TeacherCache(**KINDS[kind]), cases[0][1])
    logits, flipped_classes, losses = [], [], []
    for name, image, label in cases:
        cached(image, label, key=[f"{name}/flip0"])
        for code in (7, 0):
            axes = [axis for axis in range(3) if code >> axis & 1]
            view = image.flip([axis + 2 for axis in axes])
            target = label.flip([axis + 1 for axis in axes])
            exact = cached(view, target)
            kept = f"{name}/flip{code}" if kind == "share_flips" else f"{name}/flip0"
            if code and kind != "share_flips":
                continue
            served = cached(view, target, key=[kept])
            logits.append((served.teacher - exact.teacher).abs().max().item())
            foreground = exact.teacher.argmax(1) + served.teacher.argmax(1) > 0
            differ = served.teacher.argmax(1) != exact.teacher.argmax(1)
            flipped_classes.append((differ.sum() / foreground.sum().clamp_min(1)).item())
            losses.append(abs(served.loss.item() / exact.loss.item() - 1))
            if kind == "share_flips":
                break
    mean = [sum(values) / len(values) for values in (flipped_classes, losses)]
    return {
        "largest change of a logit": max(logits),
        "foreground voxels of another class, %": 100 * mean[0],
        "change of the objective, %": 100 * mean[1],
        "subjects": len(cases),
    }


def main() -> None:
    rows = {kind: errors(kind) for kind in KINDS}
    for kind, row in rows.items():
        print(f"{kind:12}", ", ".join(f"{name} {value:.3g}" for name, value in row.items()))
    if ARGUMENTS.json:
        ARGUMENTS.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run folder of train.py")
    parser.add_argument("--subjects", type=int, default=16)
    parser.add_argument("--json", type=Path)
    ARGUMENTS = parser.parse_args()
    main()
