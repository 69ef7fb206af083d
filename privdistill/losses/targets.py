"""References in the forms people have them, as one channel per logit channel."""

import copy
from collections.abc import MutableMapping
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from privdistill.exceptions import ObjectiveError, ShapeMismatchError
from privdistill.losses.functional import Activation, check_logits, resize
from privdistill.step import Step


class Reference(NamedTuple):
    """A target as terms use it.

    Attributes:
        channels: `(B, C, *spatial)` in float32.
        mask: 1 where a voxel counts and 0 where it is ignored, `(B, 1 or C, *spatial)`; None where
            all count.
        weights: Weight of each sample, `(B,)`, zero without a reference or with nothing but ignored
            voxels; None where all are alike.
    """

    channels: Tensor
    mask: Tensor | None
    weights: Tensor | None


def no_target(owner: str, found: Any = None) -> ObjectiveError:
    """The error where a term reads a target and the step has none, or no tensor."""
    other = "" if found is None else f" tensor but a {type(found).__name__}"
    return ObjectiveError(
        f"{owner}: the step has no target{other}. Call the wrapper as kd(image, target)."
    )


def reference(  # noqa: PLR0917
    target: Tensor | None,
    logits: Tensor,
    activation: Activation,
    owner: str,
    ignore_index: int | None = None,
    labelled: Tensor | None = None,
    sample_weights: Tensor | None = None,
    *,
    validate: bool = True,
) -> Reference:
    """Read a target in any of its forms, with what is to be left out of it."""
    if not isinstance(target, Tensor):
        raise no_target(owner, target)
    weights = weights_of_samples(labelled, sample_weights, logits, owner, validate=validate)
    check_logits(logits, activation, owner)
    per_channel = _per_channel(target, logits, activation, owner)
    # A map of labels as one channel, so that all below is of `(B, 1 or C, *spatial)`.
    target = target if per_channel else target.reshape(len(logits), 1, *logits.shape[2:])
    # Tensors on the meta device have shapes and no values.
    validate = validate and not target.is_meta
    hidden, mask = [], None
    if ignore_index is not None:
        if validate and per_channel:
            _check_ignored(ignore_index, owner)
        ignored = target == ignore_index
        if activation == "softmax":
            # Classes exclude each other: a voxel unknown in one is unknown in all.
            ignored = ignored.any(dim=1, keepdim=True)
        hidden.append(ignored)
        mask = (~ignored).to(torch.float32)
        # Nothing to be wrong about would count as perfect and lower the mean of the others.
        known = mask.flatten(1).amax(1).to(logits.device)
        weights = known if weights is None else known * weights
    if labelled is not None:
        hidden.append(~labelled.to(target.device).reshape(-1, *[1] * (target.ndim - 1)))
    for places in hidden:
        # Whatever stands there may be no class at all: put a valid value.
        valid = torch.zeros_like(target)
        valid[:, :1] = activation == "softmax"
        target = torch.where(places, valid, target)
    if per_channel:
        target = target.float()
        if validate:
            _check_channels(target, activation, owner)
        return Reference(target, mask, weights)
    if validate:
        _check_labels(target, logits.shape[1], owner)
    channels = torch.zeros(logits.shape, device=target.device).scatter_(1, target.long(), 1.0)
    return Reference(channels, mask, weights)


def _per_channel(target: Tensor, logits: Tensor, activation: Activation, owner: str) -> bool:
    """Whether a target has a channel for each of the logits'; else it is a map of labels."""
    batch, _, *spatial = shape = tuple(logits.shape)
    if target.shape == shape:
        return True
    if activation == "softmax" and tuple(target.shape) in ((batch, *spatial), (batch, 1, *spatial)):
        return False
    label_map = f" (one-hot), or a label map {(batch, *spatial)}" * (activation == "softmax")
    raise ShapeMismatchError(
        f"{owner}: the target is {tuple(target.shape)}; with {activation} it must be {shape} like "
        f"the logits{label_map}. Where it is finer, the term's option resize='logits' enlarges the "
        "logits."
    )


def _check_ignored(ignore_index: int, owner: str) -> None:
    if ignore_index in (0, 1):
        raise ObjectiveError(
            f"{owner}: ignore_index={ignore_index} would ignore whole channels of a target with "
            "one channel per class, which holds nothing but 0 and 1. Mark the voxels with another "
            "value, such as 255, or pass a label map."
        )


def read_target(step: Step) -> dict[str, Any]:
    """Return what a step says of its target, as the losses that read one take it."""
    known = {"labelled": step.labelled, "sample_weights": step.sample_weights}
    return {"target": step.target, "validate": step.validate, **known}


def enlarged(step: Step) -> Step:
    """Bring all logits of a step to the target's size, if that is finer."""
    here = step.student.shape[2:]
    size = here if step.target is None else step.target.shape[-len(here) :]
    # Coarser targets, and those of other axes, are the term's to refuse.
    if len(size) != len(here) or any(map(int.__lt__, size, here)):
        return step
    return replace(
        step,
        student=resize(step.student, size),
        teacher=None if step.teacher is None else resize(step.teacher, size),
        members=tuple((resize(logits, size), share) for logits, share in step.members),
    )


def labelled_only(step: Step, labelled: Tensor, owner: str) -> Step:
    """Reduce a step to the samples that have a reference, for whoever knows of no others."""
    # Refuses other shapes; the values are for whoever reads them to check.
    weights_of_samples(labelled, step.sample_weights, step.student, owner, validate=False)
    names = [field.name for field in fields(step)]
    return Step(**{name: _rows(getattr(step, name), labelled) for name in names})


def _rows(value: Any, chosen: Tensor) -> Any:
    """Samples of whatever is made of tensors with the batch first."""
    if isinstance(value, Tensor):
        # Scalars, such as the step's index, belong to no sample.
        batched = value.ndim > 0 and len(value) == len(chosen)
        return value[chosen.to(value.device)] if batched else value
    if isinstance(value, tuple | list):
        parts = [_rows(entry, chosen) for entry in value]
        # A named tuple takes its fields one by one.
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, MutableMapping) or (hasattr(value, "__dict__") and not callable(value)):
        # Of its own class: a mapping may give its entries as attributes, a data class be frozen.
        twin = copy.copy(value)
        held: Any = twin if isinstance(twin, MutableMapping) else vars(twin)
        for name, entry in list(held.items()):
            held[name] = _rows(entry, chosen)
        return twin
    return value


def weights_of_samples(
    labelled: Tensor | None,
    sample_weights: Tensor | None,
    logits: Tensor,
    owner: str,
    *,
    validate: bool = True,
) -> Tensor | None:
    """Return the weight of each sample, zero without a reference; None where all are alike."""
    for name, given in (("labelled", labelled), ("sample_weights", sample_weights)):
        if given is not None and given.shape != (len(logits),):
            raise ShapeMismatchError(
                f"{owner}: `{name}` is {tuple(given.shape)} for a batch of {len(logits)}. Pass one "
                "value per sample."
            )
    if labelled is not None and labelled.dtype != torch.bool:
        raise ObjectiveError(
            f"{owner}: `labelled` is {labelled.dtype}; pass a boolean mask, labelled.bool()."
        )
    if sample_weights is None:
        return None if labelled is None else labelled.to(logits.device, torch.float32)
    weights = sample_weights.to(logits.device)
    if labelled is not None:
        # Nothing is read of samples without a reference, not even a weight that is NaN.
        weights = weights.where(labelled.to(logits.device), torch.zeros_like(weights))
    if validate and not weights.is_meta and not (weights.isfinite() & (weights >= 0)).all():
        raise ObjectiveError(
            f"{owner}: `sample_weights` is {weights.tolist()}; weights must be finite and not "
            "negative."
        )
    return weights


def _check_channels(target: Tensor, activation: Activation, owner: str) -> None:
    low, high = target.min().item(), target.max().item()
    if not 0 <= low <= high <= 1:
        raise ObjectiveError(
            f"{owner}: the target holds values from {low:g} to {high:g}; one channel per class "
            "must lie in [0, 1]."
        )
    # Half-precision one-hot sums are exact; soft targets from resampling are off by rounding.
    total = target.sum(dim=1)
    if activation == "softmax" and not torch.allclose(total, total.new_ones(()), atol=1e-3):
        raise ObjectiveError(
            f"{owner}: the target's channels sum to {total.min().item():g} to "
            f"{total.max().item():g}, but softmax classes exclude each other and must sum to 1. "
            "For overlapping regions pass activation='sigmoid'; otherwise add the background "
            "channel."
        )


def _check_labels(labels: Tensor, classes: int, owner: str) -> None:
    # Unsigned integers know no comparison.
    values = torch.unique(labels if labels.is_floating_point() else labels.long())
    wrong = values[(values < 0) | (values >= classes) | (values != values.long())]
    if wrong.numel():
        found = [round(value, 4) for value in wrong[:5].tolist()]
        raise ObjectiveError(
            f"{owner}: the label map holds {found}, but the logits have classes 0 to "
            f"{classes - 1}. Map the labels to class indices first."
        )
