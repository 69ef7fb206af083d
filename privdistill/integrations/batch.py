"""What integrations share: a step's arguments in a loader's batch, and what of a step they log."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from privdistill.exceptions import LifecycleError, ObjectiveError
from privdistill.step import Output
from privdistill.wrapper import DistillationWrapper

#: Arguments of a step; those behind the first two are optional in every batch.
ARGUMENTS = ("image", "target", "present", "labelled", "sample_weights", "teacher_weights", "key")


def needs(extra: str, error: ImportError) -> str:
    """Say what to install for an integration whose package is missing."""
    return (
        f"privdistill.integrations.{extra} needs a package that cannot be imported ({error}). "
        f"Install it: pip install './privdistill[{extra}]' beside a checkout."
    )


def unwrapped(network: Any) -> DistillationWrapper:
    """Return the wrapper that DistributedDataParallel or torch.compile holds; refuse all else."""
    inner = network
    while not isinstance(inner, DistillationWrapper):
        inner = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
        if inner is None:
            raise LifecycleError(
                f"The network is a {type(network).__name__}; expected a wrapper around it, "
                "DistillationWrapper(teacher, student, objective=...)."
            )
    return inner


def finest(out: Output) -> Tensor:
    """Return the student's logits, of several heads the finest."""
    return out.student[0] if isinstance(out.student, list) else out.student


def values(out: Output) -> dict[str, Tensor]:
    """Return the loss, detached, and every term, unweighted, by name."""
    return {"loss": out.loss.detach(), **out.terms}


def check_names(names: Mapping[str, str] | None) -> dict[str, str]:
    """Return a copy of the entries that arguments have in a batch; refuse what no step takes."""
    own = dict(names or {})
    unknown = sorted(set(own) - set(ARGUMENTS))
    if unknown:
        raise ObjectiveError(
            f"names= says where {', '.join(unknown)} lies in a batch, but a step takes "
            f"{', '.join(ARGUMENTS)}. Write it as argument: entry, as {{'target': 'label'}}."
        )
    return own


def step_arguments(batch: Any, names: Mapping[str, str]) -> dict[str, Any]:
    """Find the arguments of a step in a batch.

    Args:
        batch: A pair of image and target, an image alone, or a mapping. Entries of a mapping that
            no argument is called after are left alone; so are absent ones, but for the image and
            those that `names` asks for. Beside an entry `labelled` the target may be absent.
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
    if isinstance(batch, Tensor):
        return {"image": batch}
    if isinstance(batch, Sequence) and len(batch) in {1, 2}:
        return dict(zip(ARGUMENTS, batch, strict=False))
    size = f" of {len(batch)}" if isinstance(batch, Sequence) else ""
    raise ObjectiveError(
        f"The loader gave a {type(batch).__name__}{size}; expected (image, target), an image, or a "
        f"mapping with some of {', '.join(ARGUMENTS)}."
    )


def _of_mapping(batch: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    entries = {argument: names.get(argument, argument) for argument in ARGUMENTS}
    wanted = {"image", *names}
    if entries["labelled"] in batch:
        wanted.discard("target")  # perhaps on purpose
    missing = [entries[name] for name in ARGUMENTS if name in wanted and entries[name] not in batch]
    if missing:
        raise ObjectiveError(
            f"The batch has no {', '.join(missing)}; it has {', '.join(map(str, batch))}. Say with "
            "names={argument: entry} what it is called there."
        )
    return {argument: batch[entry] for argument, entry in entries.items() if entry in batch}
