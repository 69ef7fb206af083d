"""The stand-alone model folder of a student, on which stock nnU-Net predicts."""

import json
import os
from pathlib import Path

import torch

from privdistill.exceptions import LifecycleError
from privdistill.integrations.nnunet import plans
from privdistill.integrations.nnunet.plans import Entries

#: Entry of a checkpoint's `init_args` that holds what the distillation was told, and its state.
OWN = "privdistill"
#: Trainer that a stand-alone folder names: every nnU-Net has it.
_STOCK_TRAINER = "nnUNetTrainer"
_MARKER = "privdistill.json"
_UNFINISHED = ".part"


def stand_alone_folder(trained: Path) -> Path:
    """Name the folder beside a training's, under the name of nnU-Net's trainer."""
    return trained.with_name("__".join([_STOCK_TRAINER, *trained.name.split("__")[1:]]))


def check_one_model(out: Path, trained: Path, told: dict[str, Entries]) -> Entries:
    """Refuse folds that are no one model with each other or `out`, as nnU-Net would mix them.

    Returns what all have in common of what they were told; each has a teacher of its own.
    """
    origins = {place: entries | {"written_from": trained.name} for place, entries in told.items()}
    if out.exists() and any(file.suffix != _UNFINISHED for file in out.iterdir()):
        marker = out / _MARKER
        there = plans.read(marker) if marker.is_file() else {"written_from": "elsewhere"}
        origins = {str(out): there} | origins
    (first, origin), *others = [(place, _shared(entries)) for place, entries in origins.items()]
    for place, other in others:
        unlike = plans.differences(origin, other)
        if unlike:
            raise LifecycleError(
                f"{first} and {place} are no one model. They differ in {unlike}. Train the odd one "
                "again with the options of the other, move it away, or write this student "
                "elsewhere: python -m privdistill.integrations.nnunet TRAINED FOLDER."
            )
    return origin


def _shared(told: Entries) -> Entries:
    return {name: value for name, value in told.items() if name != "teacher"}


def write_student_folder(trained: Path, out: Path | None = None, *, fold: int | str = "*") -> Path:
    """Write the stand-alone model folder of a student, on which stock nnU-Net predicts.

    It names nnU-Net's own trainer and holds the student's weights alone, with the `dataset.json`,
    plans and fingerprint of its channels. May be called again, after further folds or where the
    writing was broken off: no file is there in part.

    Args:
        trained: Folder of the training, `nnUNetTrainerDistillation__PLANS__CONFIGURATION`.
        out: Folder to write; unless given, beside it under the name of nnU-Net's trainer.
        fold: Which one, all of them unless given.

    Returns:
        The folder written.

    Raises:
        LifecycleError: If there is nothing to write, a file is damaged, folds were told different
            things, or `out` holds a model that is not this training's.
    """
    out = out or stand_alone_folder(trained)
    checkpoints = _checkpoints(trained, fold)
    told = {place: found["init_args"][OWN]["told"] for place, found in checkpoints.items()}
    origin = check_one_model(out, trained, told)
    # The marker comes first: what is broken off after it is known as ours, and written again.
    content = {_MARKER: origin}
    content |= {name: plans.read(trained / name) for name in ("dataset.json", "plans.json")}
    fingerprint = plans.read(trained / "dataset_fingerprint.json")
    reduced = plans.reduced_intensities(fingerprint, origin["channels"])
    content["dataset_fingerprint.json"] = reduced
    content |= {place: _stand_alone(checkpoint) for place, checkpoint in checkpoints.items()}
    for place, entries in content.items():
        _write_whole(out / place, entries)
    return out


def _checkpoints(trained: Path, fold: int | str) -> dict[str, Entries]:
    """Read the checkpoints to write, by their place in the folder."""
    names = ("checkpoint_final.pth", "checkpoint_best.pth")
    files = [file for name in names for file in sorted(trained.glob(f"fold_{fold}/{name}"))]
    checkpoints = {str(file.relative_to(trained)): plans.read(file) for file in files}
    if not files or not all(OWN in found["init_args"] for found in checkpoints.values()):
        raise LifecycleError(
            f"{trained} has no fold_{fold}/checkpoint_final.pth or checkpoint_best.pth of a "
            "distillation. Give nnUNetTrainerDistillation__PLANS__CONFIGURATION."
        )
    return checkpoints


def _write_whole(path: Path, entries: Entries) -> None:
    """Write a file in full or not at all, also if the process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}{_UNFINISHED}")
    try:
        if path.suffix == ".json":
            part.write_text(json.dumps(entries, indent=4) + "\n", encoding="utf-8")
        else:
            torch.save(entries, part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _stand_alone(checkpoint: Entries) -> Entries:
    """What prediction reads of a checkpoint, in tensors and plain values."""
    axes = checkpoint["inference_allowed_mirroring_axes"]
    return {
        "network_weights": dict(checkpoint["network_weights"]),
        "trainer_name": _STOCK_TRAINER,
        "init_args": {"configuration": checkpoint["init_args"]["configuration"]},
        "inference_allowed_mirroring_axes": None if axes is None else tuple(axes),
    }
