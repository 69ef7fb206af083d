"""Plans and descriptions of data sets of nnU-Net, reduced to some of the channels."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from privdistill.exceptions import ModalityError

#: Entry of plans and fingerprints that holds numbers per channel.
INTENSITIES = "foreground_intensity_properties_per_channel"


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
    every = reduced.get(INTENSITIES, {})
    if every:
        reduced[INTENSITIES] = {str(new): every[str(old)] for new, old in enumerate(channels)}
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


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """Say in which entries two trainings differ.

    Args:
        first: Entries of one; what it lacks is None.
        second: Those of the other.

    Returns:
        Text for a message; empty if they do not differ.

    Example:
        >>> differences({"imitation": 0.5, "channels": [1]}, {"imitation": 0.7, "channels": [1]})
        'imitation: 0.5 and 0.7'
    """
    unlike = [name for name in {**first, **second} if first.get(name) != second.get(name)]
    return "; ".join(f"{name}: {first.get(name)} and {second.get(name)}" for name in unlike)
