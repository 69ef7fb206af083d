"""The stand-alone model folder of a student, on which stock nnU-Net predicts.

    python -m privdistill.integrations.nnunet_folder TRAINING_FOLDER

writes it, as the end of a training does.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from privdistill.exceptions import LifecycleError
from privdistill.integrations.nnunet_plans import reduced_intensities
from privdistill.integrations.nnunet_reading import load_checkpoint, read_json

#: Trainer that a stand-alone folder names: every nnU-Net has it.
STOCK_TRAINER = "nnUNetTrainer"
#: Entry of a checkpoint's `init_args` that holds what the distillation was told, and its state.
OWN = "privdistill"
_MARKER = "privdistill.json"


def student_folder(trained: Path, out: Path | None = None) -> Path:
    """Say where the stand-alone folder of a student belongs.

    Args:
        trained: Folder of the training.
        out: Folder wanted; unless given, beside it under the name of nnU-Net's trainer.

    Returns:
        The folder; it may not be there yet.

    Raises:
        LifecycleError: If it holds a model that was not written from a distillation.
    """
    beside = "__".join([STOCK_TRAINER, *trained.name.split("__")[1:]])
    out = trained.with_name(beside) if out is None else out
    if out.exists() and any(out.iterdir()) and not (out / _MARKER).is_file():
        raise LifecycleError(
            f"{out} holds a model that was not written from a distillation, and stays as it is. "
            "Move it away, or write the student's elsewhere: "
            "python -m privdistill.integrations.nnunet_folder TRAINED --out FOLDER."
        )
    return out


def write_student_folder(trained: Path, out: Path | None = None, *, fold: int | str = "*") -> Path:
    """Write the stand-alone model folder of a student, on which stock nnU-Net predicts.

    It names nnU-Net's own trainer and holds the student's weights alone, with the `dataset.json`,
    plans and fingerprint of its channels. May be called again, after further folds.

    Args:
        trained: Folder of the training, `nnUNetTrainerDistillation__PLANS__CONFIGURATION`.
        out: Folder to write; as in `student_folder`.
        fold: Which one, all of them unless given.

    Returns:
        The folder written.

    Raises:
        LifecycleError: If there is nothing to write, or `out` holds a model that is not ours.
    """
    out = student_folder(trained, out)
    files = [
        file
        for name in ("checkpoint_final.pth", "checkpoint_best.pth")
        for file in sorted(trained.glob(f"fold_{fold}/{name}"))
    ]
    checkpoints = {file.relative_to(trained): load_checkpoint(file) for file in files}
    told = [c["init_args"].get(OWN, {}).get("told") for c in checkpoints.values()]
    if not told or None in told:
        raise LifecycleError(
            f"{trained} has no fold_{fold}/checkpoint_final.pth or checkpoint_best.pth of "
            "nnUNetTrainerDistillation. Give the folder of its training, "
            "nnUNetTrainerDistillation__PLANS__CONFIGURATION."
        )
    for place, checkpoint in checkpoints.items():
        (out / place).parent.mkdir(parents=True, exist_ok=True)
        torch.save(_stand_alone(checkpoint), out / place)
    fingerprint = read_json(trained / "dataset_fingerprint.json")
    written = {name: read_json(trained / name) for name in ("dataset.json", "plans.json")}
    written["dataset_fingerprint.json"] = reduced_intensities(fingerprint, told[0]["channels"])
    written[_MARKER] = told[0] | {"written_from": trained.name}
    for name, content in written.items():
        (out / name).write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")
    return out


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
