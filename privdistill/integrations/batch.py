"""What a step of the wrapper needs, found in the batches of a loader."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from privdistill.exceptions import ObjectiveError
from privdistill.losses import Objective

#: Arguments of a step; those behind the first two are optional in every batch.
ARGUMENTS = (
    *("image", "target", "present", "labelled"),
    *("sample_weights", "teacher_weights", "key"),
)


def check_names(names: Mapping[str, str] | None) -> dict[str, str]:
    """Refuse names for what no step takes.

    Args:
        names: Entry of the batch for each argument of the step, or None.

    Returns:
        A copy.

    Raises:
        ObjectiveError: If an argument does not exist.
    """
    own = dict(names or {})
    unknown = sorted(set(own) - set(ARGUMENTS))
    if unknown:
        raise ObjectiveError(
            f"names= says where {', '.join(unknown)} lies in a batch, but a step takes "
            f"{', '.join(ARGUMENTS)}. Write it as argument: entry, as {{'target': 'label'}}."
        )
    return own


def step_arguments(
    batch: Any, names: Mapping[str, str], objective: Objective | None = None
) -> dict[str, Any]:
    """Find the arguments of a step in a batch.

    Args:
        batch: A pair of image and target, an image alone, or a mapping. Entries of a mapping that
            no argument is called after are left alone; so are absent ones, but for the image and
            those that `names` asks for. Beside an entry `labelled` the target may be absent.
        names: Entry of a mapping for an argument that is called otherwise.
        objective: Of the wrapper, where it is computed from this batch. If it reads the target,
            there has to be one, or an entry `labelled` that is False for each sample: terms would
            leave a reference that is called otherwise out without a word.

    Returns:
        Arguments of `DistillationWrapper.forward` by name; always with "image".

    Raises:
        ObjectiveError: If the batch has another form, or an entry or the target is missing.

    Example:
        >>> step_arguments({"image": 1, "label": 2, "affine": 3}, {"target": "label"})
        {'image': 1, 'target': 2}
    """
    given = _found(batch, names)
    if objective is not None and objective.needs_target and given.get("target") is None:
        _check_unlabelled(given, batch)
    return given


def _found(batch: Any, names: Mapping[str, str]) -> dict[str, Any]:
    if isinstance(batch, Mapping):
        return _of_mapping(batch, names)
    if isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) in {1, 2}:
        return dict(zip(ARGUMENTS, batch, strict=False))
    if hasattr(batch, "shape"):
        return {"image": batch}
    size = f" of {len(batch)}" if isinstance(batch, Sequence) else ""
    raise ObjectiveError(
        f"The loader gave a {type(batch).__name__}{size}; expected (image, target), an image, or a "
        f"mapping with some of {', '.join(ARGUMENTS)}. Return a mapping from the data set to pass "
        "more than image and target."
    )


def _of_mapping(batch: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    entries = {argument: names.get(argument, argument) for argument in ARGUMENTS}
    wanted = {"image", *names}
    if entries["labelled"] in batch:
        wanted.discard("target")  # perhaps on purpose
    missing = [entries[argument] for argument in ARGUMENTS if argument in wanted]
    missing = [entry for entry in missing if entry not in batch]
    if missing:
        raise ObjectiveError(
            f"The batch has no {', '.join(missing)}; it has {', '.join(map(str, batch))}. Say with "
            "names={argument: entry} what it is called there."
        )
    return {argument: batch[entry] for argument, entry in entries.items() if entry in batch}


def _check_unlabelled(given: Mapping[str, Any], batch: Any) -> None:
    if "labelled" in given and not torch.as_tensor(given["labelled"]).any():
        return
    mapping = isinstance(batch, Mapping)
    there = f"has {', '.join(map(str, batch))}" if mapping else "is an image alone"
    raise ObjectiveError(
        f"The batch has no target, which the objective reads; it {there}. Say with "
        "names={'target': entry} what it is called there. For a batch that has no reference on "
        "purpose, return a mapping whose entry labelled is False for each sample."
    )


def check_options(options: Mapping[str, Any], asks: str) -> None:
    """Refuse options of MONAI's engines that a wrapper stands in for.

    Args:
        options: What the caller passes on.
        asks: Name of the class that was given the options.

    Raises:
        ObjectiveError: If one of them is `loss_function` or `prepare_batch`.
    """
    if "loss_function" in options:
        raise ObjectiveError(
            f"{asks}: loss_function= is not taken, as the objective of the wrapper is the loss. "
            "Pass DistillationWrapper(objective=...) instead."
        )
    if "prepare_batch" in options:
        raise ObjectiveError(
            f"{asks}: prepare_batch= is not taken, as a step has more arguments than image and "
            "target. Say with names={argument: entry} where they lie, or change the batch with "
            "a transform of the data set."
        )
