"""Plans, descriptions and checkpoints of nnU-Net: read with care, compared, cut to channels."""

import json
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import numpy as np
import torch

from privdistill.exceptions import LifecycleError, ModalityError

Entries = dict[str, Any]
#: Entry of plans and fingerprints that holds numbers per channel.
INTENSITIES = "foreground_intensity_properties_per_channel"
_PER_CHANNEL = ("normalization_schemes", "use_mask_for_norm")
_CASCADE = ("inherits_from", "next_stage", "previous_stage")
# What nnU-Net's own checkpoints hold besides tensors and plain values: the numbers of its logs,
# also under the name that numpy 1 gave them.
_SCALAR = np.float64(0).__reduce__()[0]
_SAFE: list[Any] = [_SCALAR, (_SCALAR, "numpy.core.multiarray.scalar"), np.dtype]
_SAFE += [type(np.dtype(name)) for name in ("float64", "float32", "int64")]
_ENTRIES = {"network_weights", "trainer_name", "init_args", "inference_allowed_mirroring_axes"}


def read(path: Path) -> Entries:
    """Read JSON or a checkpoint of a model folder, without running what a pickle may hold."""
    if not path.is_file():
        folder = path.parents[path.suffix == ".pth"]
        beside = sorted(str(file.relative_to(folder)) for file in folder.glob("fold_*/*.pth"))
        raise LifecycleError(
            f"{path} does not exist; beside it are {', '.join(beside) or 'no checkpoints'}. "
            "Expected nnU-Net's model folder, nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION,"
            " of the same fold: a teacher of another one has seen the student's validation cases."
        )
    found, needed = None, _ENTRIES if path.suffix == ".pth" else set()
    try:
        if path.suffix == ".json":
            found = json.loads(path.read_text(encoding="utf-8"))
        elif is_zipfile(path):
            with torch.serialization.safe_globals(_SAFE):
                found = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise LifecycleError(
            f"{path} holds more than tensors and plain values, and can run any program when it is "
            "read, so it is not. If you trust who made it, read it with torch.load(path, "
            f"weights_only=False) and save it without: {str(error).splitlines()[0]}"
        ) from error
    except (RuntimeError, EOFError, ValueError):
        pass  # said below
    if not isinstance(found, dict) or not needed <= set(found):
        raise LifecycleError(f"{path} is damaged, or no file of nnU-Net. Copy it again.")
    return found


def differences(first: Entries, second: Entries) -> str:
    """Say in which entries two trainings differ; nothing where they do not."""
    unlike = [name for name in {**first, **second} if first.get(name) != second.get(name)]
    return "; ".join(f"{name}: {first.get(name)} and {second.get(name)}" for name in unlike)


def common_facts(plans: Entries, configuration: Entries, dataset: Entries) -> Entries:
    """What teacher and student must have in common to see the same patches and say the same."""
    facts = {name: configuration[name] for name in ("spacing", "patch_size", *_PER_CHANNEL)}
    facts |= {"channels": channel_names(dataset), "labels": dataset["labels"]}
    facts |= {"regions": dataset.get("regions_class_order"), "axes": plans["transpose_forward"]}
    # Other schemes look at the image alone.
    if "CTNormalization" in facts["normalization_schemes"]:
        facts[INTENSITIES] = plans[INTENSITIES]
    return facts


def channel_names(dataset: Entries) -> list[str]:
    """List the channels of a data set in the order of its files."""
    names = dataset["channel_names" if "channel_names" in dataset else "modality"]
    return [str(names[key]) for key in sorted(names, key=int)]


def channel_indices(dataset: Entries, wanted: Sequence[str]) -> list[int]:
    """Find channels by name, or by number where names repeat, in the order asked for."""
    names = channel_names(dataset)
    places = {str(index): index for index in range(len(names))}
    places |= {name: index for index, name in enumerate(names) if names.count(name) == 1}
    wanted = [name for name in wanted if name]
    found = {places[name]: name for name in wanted if name in places}
    if not found or len(found) != len(wanted):
        listed = ", ".join(f"{number} ({name})" for number, name in enumerate(names))
        raise ModalityError(
            f"The student's channels are {', '.join(wanted) or 'not given'}; the data set has "
            f"{listed}. Name each of them once, or give its number where names repeat: "
            "PRIVDISTILL_CHANNELS=t1ce, or several with commas."
        )
    return list(found)


def reduced_dataset(dataset: Entries, channels: Sequence[int]) -> Entries:
    """Copy a `dataset.json` with some of the channels, numbered anew."""
    names = channel_names(dataset)
    kept = {key: value for key, value in dataset.items() if key != "modality"}
    return deepcopy(kept) | {"channel_names": {str(i): names[c] for i, c in enumerate(channels)}}


def reduced_intensities(holder: Entries, channels: Sequence[int]) -> Entries:
    """Copy plans or a fingerprint with the intensities of some of the channels."""
    every = holder.get(INTENSITIES, {})
    own = {str(index): every[str(channel)] for index, channel in enumerate(channels) if every}
    return deepcopy(holder | ({INTENSITIES: own} if own else {}))


def reduced_plans(
    plans: Entries, configuration: str, resolved: Entries, dataset: Entries, channels: Sequence[int]
) -> Entries:
    """Copy the plans of one configuration for some of the channels, under a name of their own.

    What decides how images are cropped, resampled and cut into patches stays.
    """
    own = {key: value for key, value in resolved.items() if key not in _CASCADE}
    own |= {key: [resolved[key][index] for index in channels] for key in _PER_CHANNEL}
    # The name tells students of other channels apart, by numbers where names repeat.
    words = ["".join(filter(str.isalnum, name)) for name in channel_names(dataset)]
    marks = [words[i] if words[i] and words.count(words[i]) == 1 else str(i) for i in channels]
    name = "_".join([plans["plans_name"], *marks])
    reduced = reduced_intensities(plans, channels)
    return reduced | {"plans_name": name, "configurations": {configuration: deepcopy(own)}}
