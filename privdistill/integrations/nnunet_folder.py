"""The stand-alone model folder of a student, on which stock nnU-Net predicts.

    python -m privdistill.integrations.nnunet_folder TRAINING_FOLDER

writes it, as the end of a training does.
"""

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from privdistill.exceptions import LifecycleError
from privdistill.integrations.nnunet_plans import differences, reduced_intensities
from privdistill.integrations.nnunet_reading import load_checkpoint, read_json

#: Trainer that a stand-alone folder names: every nnU-Net has it.
STOCK_TRAINER = "nnUNetTrainer"
#: Entry of a checkpoint's `init_args` that holds what the distillation was told, and its state.
OWN = "privdistill"
_MARKER = "privdistill.json"
_UNFINISHED = ".part"
_COMMAND = "python -m privdistill.integrations.nnunet_folder TRAINED --out FOLDER."


def student_folder(trained: Path, told: Mapping[str, Any], out: Path | None = None) -> Path:
    """Say where the stand-alone folder of a student belongs.

    Args:
        trained: Folder of the training.
        told: What the distillation was told, as its checkpoints have it.
        out: Folder wanted; unless given, beside it under the name of nnU-Net's trainer.

    Returns:
        The folder; it may not be there yet.

    Raises:
        LifecycleError: If it holds the model of another training, whose folds would be mixed with
            these, or one that was not written from a distillation.
    """
    beside = "__".join([STOCK_TRAINER, *trained.name.split("__")[1:]])
    out = trained.with_name(beside) if out is None else out
    marker, origin = out / _MARKER, _origin(trained, told)
    if marker.is_file():
        unlike = differences(read_json(marker), origin)
        if unlike:
            raise LifecycleError(
                f"{out} holds the student of another training. They differ in (there and here) "
                f"{unlike}. nnU-Net would take folds of both for one model. Move that folder away "
                "or remove it, as it can be written again from its training, or write this student "
                f"elsewhere: {_COMMAND}"
            )
    elif out.exists() and any(file.suffix != _UNFINISHED for file in out.iterdir()):
        raise LifecycleError(
            f"{out} holds a model that was not written from a distillation, and stays as it is. "
            f"Move it away, or write the student's elsewhere: {_COMMAND}"
        )
    return out


def _origin(trained: Path, told: Mapping[str, Any]) -> dict[str, Any]:
    """What the folds of a stand-alone folder have in common: each has a teacher of its own."""
    shared = {name: value for name, value in told.items() if name != "teacher"}
    return shared | {"written_from": trained.name}


def write_student_folder(trained: Path, out: Path | None = None, *, fold: int | str = "*") -> Path:
    """Write the stand-alone model folder of a student, on which stock nnU-Net predicts.

    It names nnU-Net's own trainer and holds the student's weights alone, with the `dataset.json`,
    plans and fingerprint of its channels. May be called again, after further folds or where the
    writing was broken off: no file is there in part.

    Args:
        trained: Folder of the training, `nnUNetTrainerDistillation__PLANS__CONFIGURATION`.
        out: Folder to write; as in `student_folder`.
        fold: Which one, all of them unless given.

    Returns:
        The folder written.

    Raises:
        LifecycleError: If there is nothing to write, a file is damaged, folds were told different
            things, or `out` holds a model that is not this training's.
    """
    checkpoints = _checkpoints(trained, fold)
    told = _told(trained, checkpoints)
    out = student_folder(trained, told, out)
    # The marker comes first: what is broken off after it is known as ours, and written again.
    content = {_MARKER: _origin(trained, told)}
    content |= {name: read_json(trained / name) for name in ("dataset.json", "plans.json")}
    fingerprint = read_json(trained / "dataset_fingerprint.json")
    content["dataset_fingerprint.json"] = reduced_intensities(fingerprint, told["channels"])
    for name, value in content.items():
        text = json.dumps(value, indent=4) + "\n"
        _write_whole(out / name, partial(Path.write_text, data=text, encoding="utf-8"))
    for place, checkpoint in checkpoints.items():
        _write_whole(out / place, partial(torch.save, _stand_alone(checkpoint)))
    return out


def _checkpoints(trained: Path, fold: int | str) -> dict[Path, dict[str, Any]]:
    """The checkpoints to write, by their place in the folder."""
    files = [
        file
        for name in ("checkpoint_final.pth", "checkpoint_best.pth")
        for file in sorted(trained.glob(f"fold_{fold}/{name}"))
    ]
    checkpoints = {file.relative_to(trained): load_checkpoint(file) for file in files}
    if not files or not all(OWN in found["init_args"] for found in checkpoints.values()):
        raise LifecycleError(
            f"{trained} has no fold_{fold}/checkpoint_final.pth or checkpoint_best.pth of "
            "nnUNetTrainerDistillation. Give the folder of its training, "
            "nnUNetTrainerDistillation__PLANS__CONFIGURATION."
        )
    return checkpoints


def _told(trained: Path, checkpoints: Mapping[Path, Mapping[str, Any]]) -> dict[str, Any]:
    """What the distillation was told in every fold."""
    (first, told), *others = ((p, c["init_args"][OWN]["told"]) for p, c in checkpoints.items())
    for place, other in others:
        unlike = differences(_origin(trained, told), _origin(trained, other))
        if unlike:
            raise LifecycleError(
                f"{trained} holds folds that are no one model: {first} and {place} differ in "
                f"{unlike}. Train the odd one again with the options of the others, or move it "
                "away."
            )
    return dict(told)


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file in full or not at all, also if the process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}{_UNFINISHED}")
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _stand_alone(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What prediction reads of a checkpoint, in tensors and plain values."""
    axes = checkpoint["inference_allowed_mirroring_axes"]
    return {
        "network_weights": dict(checkpoint["network_weights"]),
        "trainer_name": STOCK_TRAINER,
        "init_args": {"configuration": checkpoint["init_args"]["configuration"]},
        "inference_allowed_mirroring_axes": None if axes is None else tuple(axes),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a stand-alone folder from the command line.

    Args:
        arguments: Words after the program's name; None takes those of the process.
    """
    parser = argparse.ArgumentParser(description="Write the stand-alone folder of a student.")
    parser.add_argument(
        "trained", type=Path, help="nnUNetTrainerDistillation__PLANS__CONFIGURATION"
    )
    parser.add_argument("--out", type=Path, help="folder to write; beside the other unless given")
    options = parser.parse_args(arguments)
    print(write_student_folder(options.trained, options.out))


if __name__ == "__main__":
    main()
