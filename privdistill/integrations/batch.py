"""What a step of the wrapper needs, found in the batches of a loader."""

from collections.abc import Mapping, Sequence
from typing import Any

from privdistill.exceptions import ObjectiveError

#: Arguments of a step; those behind the first two are optional in every batch.
ARGUMENTS = (
    *("image", "target", "present", "labelled"),
    *("sample_weights", "teacher_weights", "key"),
)


def check_names(names: Mapping[str, str]) -> None:
    """Refuse names for what no step takes.

    Args:
        names: Entry of the batch for each argument of the step.

    Raises:
        ObjectiveError: If an argument does not exist.
    """
    unknown = sorted(set(names) - set(ARGUMENTS))
    if unknown:
        raise ObjectiveError(
            f"names= says where {', '.join(unknown)} lies in a batch, but a step takes "
            f"{', '.join(ARGUMENTS)}. Write it as argument: entry, as {{'target': 'label'}}."
        )


def step_arguments(batch: Any, names: Mapping[str, str]) -> dict[str, Any]:
    """Find the arguments of a step in a batch.

    Args:
        batch: A pair of image and target, an image alone, or a mapping. Entries of a mapping that
            no argument is called after are left alone; so are absent ones, but for the image and
            those that `names` asks for.
        names: Entry of a mapping for an argument that is called otherwise.

    Returns:
        Arguments of `DistillationWrapper.forward` by name; always with "image".

    Raises:
        ObjectiveError: If the batch has another form, or an entry is missing.

    Example:
        >>> step_arguments({"image": 1, "label": 2, "affine": 3}, {"target": "label"})
        {'image': 1, 'target': 2}
    """
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
    missing = [entries[argument] for argument in ARGUMENTS if argument in wanted]
    missing = [entry for entry in missing if entry not in batch]
    if missing:
        raise ObjectiveError(
            f"The batch has no {', '.join(missing)}; it has {', '.join(map(str, batch))}. Say with "
            "names={argument: entry} what it is called there."
        )
    return {argument: batch[entry] for argument, entry in entries.items() if entry in batch}
