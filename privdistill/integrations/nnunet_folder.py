"""Model folders of nnU-Net: read with care, reduced to some channels, written for stock prediction.

    python -m privdistill.integrations.nnunet_folder TRAINING_FOLDER

writes the stand-alone folder of a student, as the end of its training does.
"""

import argparse
import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch

from privdistill.exceptions import LifecycleError, ModalityError

#: Trainer that a stand-alone folder names: every nnU-Net has it.
STOCK_TRAINER = "nnUNetTrainer"
#: Entry of a checkpoint's `init_args` that holds what the distillation was told, and its state.
OWN = "privdistill"
_MARKER = "privdistill.json"
_INTENSITIES = "foreground_intensity_properties_per_channel"
# What nnU-Net's own checkpoints hold besides tensors and plain values: the numbers of its logs,
# also under the name that numpy 1 gave them.
_SCALAR = np.float64(0).__reduce__()[0]
_SAFE: list[Any] = [_SCALAR, (_SCALAR, "numpy.core.multiarray.scalar"), np.dtype]
_SAFE += [type(np.dtype(name)) for name in ("float64", "float32", "int64")]


def channel_names(dataset: Mapping[str, Any]) -> list[str]:
    """Return the channels of a data set in the order of its files.

    Args:
        dataset: What `dataset.json` holds.

    Returns:
        Names, of channel 0 first.

    Example:
        >>> channel_names({"channel_names": {"1": "t1ce", "0": "t1"}})
        ['t1', 't1ce']
    """
    names = dataset.get("channel_names", dataset.get("modality", {}))
    return [str(names[key]) for key in sorted(names, key=int)]


def channel_indices(dataset: Mapping[str, Any], wanted: Sequence[str]) -> list[int]:
    """Find channels by name, or by number where names repeat.

    Args:
        dataset: What `dataset.json` holds.
        wanted: Names as in `channel_names`, or numbers as in the names of files.

    Returns:
        Positions, in the order asked for.

    Raises:
        ModalityError: If nothing is asked for, a channel is not there, or twice, or names repeat.

    Example:
        >>> channel_indices({"channel_names": {"0": "t1", "1": "t1ce"}}, ["t1ce"])
        [1]
    """
    names = channel_names(dataset)
    numbers = [str(index) for index in range(len(names))]
    found = [
        names.index(name) if names.count(name) == 1 else numbers.index(name)
        for name in wanted
        if names.count(name) == 1 or name in numbers
    ]
    if not found or len(found) != len(wanted) or len(set(found)) != len(found):
        listed = ", ".join(f"{number} ({name})" for number, name in enumerate(names))
        raise ModalityError(
            f"The student's channels are {', '.join(wanted) or 'not given'}; the data set has "
            f"{listed}. Name each of them once, or give its number where names repeat: "
            "PRIVDISTILL_CHANNELS=t1ce, or several with commas."
        )
    return found


def plans_name(plans: str, dataset: Mapping[str, Any], channels: Sequence[int]) -> str:
    """Name the plans of a student, so that students of other channels get other folders.

    Args:
        plans: Name of the plans of all channels.
        dataset: What `dataset.json` holds.
        channels: Positions of the student's.

    Returns:
        The name, with the channels' names, or their numbers where names repeat.

    Example:
        >>> plans_name("nnUNetPlans", {"channel_names": {"0": "T1", "1": "T1 CE"}}, [1])
        'nnUNetPlans_T1CE'
    """
    words = ["".join(filter(str.isalnum, name)) for name in channel_names(dataset)]
    own = [words[i] if words[i] and words.count(words[i]) == 1 else str(i) for i in channels]
    return "_".join([plans, *own])


def reduced_dataset(dataset: Mapping[str, Any], channels: Sequence[int]) -> dict[str, Any]:
    """Return a `dataset.json` with some of the channels, numbered anew.

    Args:
        dataset: What the file holds.
        channels: Positions of those to keep.

    Returns:
        A copy.

    Example:
        >>> reduced_dataset({"channel_names": {"0": "t1", "1": "t1ce"}}, [1])
        {'channel_names': {'0': 't1ce'}}
    """
    names = channel_names(dataset)
    kept = {key: value for key, value in dataset.items() if key != "modality"}
    chosen = {str(new): names[old] for new, old in enumerate(channels)}
    return copy.deepcopy(kept) | {"channel_names": chosen}


def reduced_intensities(holder: Mapping[str, Any], channels: Sequence[int]) -> dict[str, Any]:
    """Return plans or a fingerprint with the intensities of some of the channels.

    Args:
        holder: What the file holds.
        channels: Positions of those to keep.

    Returns:
        A copy.

    Example:
        >>> of_channel = {"0": {"mean": 5.0}, "1": {"mean": 6.0}}
        >>> reduced_intensities({"foreground_intensity_properties_per_channel": of_channel}, [1])
        {'foreground_intensity_properties_per_channel': {'0': {'mean': 6.0}}}
    """
    reduced = copy.deepcopy(dict(holder))
    every = reduced.get(_INTENSITIES, {})
    if every:
        reduced[_INTENSITIES] = {str(new): every[str(old)] for new, old in enumerate(channels)}
    return reduced


def reduced_plans(
    plans: Mapping[str, Any],
    configuration: str,
    resolved: Mapping[str, Any],
    channels: Sequence[int],
    name: str,
) -> dict[str, Any]:
    """Return plans of one configuration for some of the channels.

    Everything that decides how images are cropped, resampled and cut into patches stays; of what is
    said per channel the student's part is kept. Stages of a cascade are left out.

    Args:
        plans: What the plans' file holds.
        configuration: Its name.
        resolved: The configuration with what it inherits.
        channels: Positions of those to keep.
        name: Of the new plans.

    Returns:
        New plans.
    """
    own = copy.deepcopy(dict(resolved))
    for key in ("normalization_schemes", "use_mask_for_norm"):
        own[key] = [own[key][index] for index in channels]
    for key in ("inherits_from", "next_stage", "previous_stage"):
        own.pop(key, None)
    own_part = {"plans_name": name, "configurations": {configuration: own}}
    return reduced_intensities(plans, channels) | own_part


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of nnU-Net without running what a pickle may hold.

    Args:
        path: The file.

    Returns:
        What it holds.

    Raises:
        LifecycleError: If it is not there, or holds more than tensors, plain values and numbers.
    """
    if not path.is_file():
        beside = sorted(
            str(p.relative_to(path.parents[1])) for p in path.parents[1].glob("fold_*/*.pth")
        )
        raise LifecycleError(
            f"{path} does not exist; beside it are {', '.join(beside) or 'no checkpoints'}. "
            "Train that fold to its end first, with the same fold for teacher and student: a "
            "teacher of another fold has seen the student's validation cases."
        )
    try:
        with torch.serialization.safe_globals(_SAFE):
            return dict(torch.load(path, map_location="cpu", weights_only=True))
    except UnpicklingError as error:
        raise LifecycleError(
            f"{path} holds more than tensors and plain values: {str(error).splitlines()[0]} A "
            "checkpoint can run any program when it is read, so this one is not. If you trust who "
            "made it, read it with torch.load(path, weights_only=False) and save its entries "
            "network_weights, trainer_name, init_args and inference_allowed_mirroring_axes anew."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a file of nnU-Net's.

    Args:
        path: The file.

    Returns:
        What it holds.

    Raises:
        LifecycleError: If there is none.
    """
    if not path.is_file():
        raise LifecycleError(
            f"{path} does not exist. Expected a model folder of nnU-Net with dataset.json, "
            "plans.json and fold_*/, as nnUNetv2_train leaves it: "
            "nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION."
        )
    return dict(json.loads(path.read_text(encoding="utf-8")))


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
