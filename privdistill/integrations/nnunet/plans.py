"""Plans, descriptions and checkpoints of nnU-Net: read with care, compared, cut to channels."""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import numpy as np
import torch

from privdistill.exceptions import LifecycleError, ModalityError

#: Entry of plans and fingerprints that holds numbers per channel.
INTENSITIES = "foreground_intensity_properties_per_channel"
_ALIKE = ("spacing", "patch_size", "normalization_schemes", "use_mask_for_norm")
# What nnU-Net's own checkpoints hold besides tensors and plain values: the numbers of its logs,
# also under the name that numpy 1 gave them.
_SCALAR = np.float64(0).__reduce__()[0]
_SAFE: list[Any] = [_SCALAR, (_SCALAR, "numpy.core.multiarray.scalar"), np.dtype]
_SAFE += [type(np.dtype(name)) for name in ("float64", "float32", "int64")]
_ENTRIES = {"network_weights", "trainer_name", "init_args"}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a model folder."""
    if not path.is_file():
        raise LifecycleError(
            f"{path} does not exist. Expected a model folder of nnU-Net with dataset.json, "
            "plans.json and fold_*/: nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION."
        )
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise LifecycleError(
            f"{path} is damaged: it is no JSON object ({error}). Copy it again."
        ) from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint without running what a pickle may hold."""
    if not path.is_file():
        folder = path.parents[1]
        beside = sorted(str(file.relative_to(folder)) for file in folder.glob("fold_*/*.pth"))
        raise LifecycleError(
            f"{path} does not exist; beside it are {', '.join(beside) or 'no checkpoints'}. "
            "Train that fold to its end first, with the same fold for teacher and student: a "
            "teacher of another fold has seen the student's validation cases."
        )
    found: Any = None
    try:
        if is_zipfile(path):
            with torch.serialization.safe_globals(_SAFE):
                found = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise LifecycleError(
            f"{path} holds more than tensors and plain values: {str(error).splitlines()[0]} A "
            "checkpoint can run any program when it is read, so this one is not. If you trust who "
            "made it, read it with torch.load(path, weights_only=False) and save its entries "
            "network_weights, trainer_name, init_args and inference_allowed_mirroring_axes anew."
        ) from error
    except (RuntimeError, EOFError, ValueError):
        pass  # said below
    if not isinstance(found, dict) or not set(found) >= _ENTRIES:
        raise LifecycleError(
            f"{path} is damaged, or no checkpoint of nnU-Net. Copy it again, or train that fold "
            "anew."
        )
    return found


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """Say in which entries two trainings differ; nothing where they do not."""
    unlike = [name for name in {**first, **second} if first.get(name) != second.get(name)]
    return "; ".join(f"{name}: {first.get(name)} and {second.get(name)}" for name in unlike)


def common_facts(
    plans: Mapping[str, Any], configuration: Mapping[str, Any], dataset: Mapping[str, Any]
) -> dict[str, Any]:
    """What teacher and student must have in common to see the same patches and say the same."""
    facts = {name: configuration[name] for name in _ALIKE}
    facts |= {"channels": channel_names(dataset), "labels": dataset["labels"]}
    facts["regions_class_order"] = dataset.get("regions_class_order")
    facts["transpose_forward"] = plans["transpose_forward"]
    # Other schemes look at the image alone.
    if "CTNormalization" in facts["normalization_schemes"]:
        facts[INTENSITIES] = plans[INTENSITIES]
    return facts


def channel_names(dataset: Mapping[str, Any]) -> list[str]:
    """List the channels of a data set in the order of its files."""
    names = dataset.get("channel_names", dataset.get("modality", {}))
    return [str(names[key]) for key in sorted(names, key=int)]


def channel_indices(dataset: Mapping[str, Any], wanted: Sequence[str]) -> list[int]:
    """Find channels by name, or by number where names repeat, in the order asked for."""
    names = channel_names(dataset)
    numbers = [str(index) for index in range(len(names))]
    known = numbers + [name if names.count(name) == 1 else "" for name in names]
    # A name that looks like a number comes first.
    found = [len(known) - 1 - known[::-1].index(name) for name in wanted if name and name in known]
    found = [index % len(names) for index in found]
    if not found or len(found) != len(wanted) or len(set(found)) != len(found):
        listed = ", ".join(f"{number} ({name})" for number, name in enumerate(names))
        raise ModalityError(
            f"The student's channels are {', '.join(wanted) or 'not given'}; the data set has "
            f"{listed}. Name each of them once, or give its number where names repeat: "
            "PRIVDISTILL_CHANNELS=t1ce, or several with commas."
        )
    return found


def reduced_dataset(dataset: Mapping[str, Any], channels: Sequence[int]) -> dict[str, Any]:
    """Copy a `dataset.json` with some of the channels, numbered anew."""
    names = channel_names(dataset)
    kept = {key: value for key, value in dataset.items() if key != "modality"}
    chosen = {str(new): names[old] for new, old in enumerate(channels)}
    return copy.deepcopy(kept) | {"channel_names": chosen}


def reduced_intensities(holder: Mapping[str, Any], channels: Sequence[int]) -> dict[str, Any]:
    """Copy plans or a fingerprint with the intensities of some of the channels."""
    reduced = copy.deepcopy(dict(holder))
    every = reduced.get(INTENSITIES, {})
    if every:
        reduced[INTENSITIES] = {str(new): every[str(old)] for new, old in enumerate(channels)}
    return reduced


def reduced_plans(
    plans: Mapping[str, Any],
    configuration: str,
    resolved: Mapping[str, Any],
    dataset: Mapping[str, Any],
    channels: Sequence[int],
) -> dict[str, Any]:
    """Copy the plans of one configuration for some of the channels, under a name of their own.

    What decides how images are cropped, resampled and cut into patches stays.
    """
    own = copy.deepcopy(dict(resolved))
    for key in ("normalization_schemes", "use_mask_for_norm"):
        own[key] = [own[key][index] for index in channels]
    for key in ("inherits_from", "next_stage", "previous_stage"):
        own.pop(key, None)
    # Their names tell students of other channels apart, or numbers where names repeat.
    words = ["".join(filter(str.isalnum, name)) for name in channel_names(dataset)]
    marks = [words[i] if words[i] and words.count(words[i]) == 1 else str(i) for i in channels]
    name = "_".join([plans["plans_name"], *marks])
    own_part = {"plans_name": name, "configurations": {configuration: own}}
    return reduced_intensities(plans, channels) | own_part
