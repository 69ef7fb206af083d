"""References in the forms people have them, as one channel per logit channel."""

from collections.abc import Mapping
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


def reference(
    target: Tensor | None,
    logits: Tensor,
    activation: Activation,
    *,
    owner: str,
    ignore_index: int | None = None,
    labelled: Tensor | None = None,
    sample_weights: Tensor | None = None,
    validate: bool = True,
) -> Reference:
    """Read a target, with what is to be left out of it.

    Args:
        target: One-hot classes or regions, or under softmax a label map.
        logits: What the target is compared with, `(B, C, *spatial)`.
        activation: "softmax" or "sigmoid".
        owner: Name of the term or function, for messages.
        ignore_index: Value that marks voxels to leave out; in one-hot targets a voxel is left out
            if any channel holds it, in regions each channel for itself.
        labelled: Which samples have a reference, boolean `(B,)`; None where all have.
        sample_weights: Weight of each sample, `(B,)`, or None.
        validate: Whether to check values as well as shapes.

    Returns:
        Channels, mask and weights.

    Raises:
        ShapeMismatchError: If the target, the labelled mask or the weights have another form.
        ObjectiveError: If there is no target, or its values do not fit.
    """
    if target is None:
        raise ObjectiveError(
            f"{owner}: the step has no target. Call the wrapper as kd(image, target)."
        )
    mask = weights = None
    hides = ignore_index is not None or labelled is not None
    # What has a wrong shape is refused below.
    fits = hides and (target.shape == logits.shape or _is_label_map(target, logits))
    if ignore_index is not None and fits:
        if validate and ignore_index in (0, 1) and target.shape == logits.shape:
            raise ObjectiveError(
                f"{owner}: ignore_index={ignore_index} would ignore whole channels of a target "
                "with one channel per class, which holds nothing but 0 and 1. Mark the voxels with "
                "another value, such as 255, or pass a label map."
            )
        ignored = target == ignore_index
        if activation == "softmax" and target.shape == logits.shape:
            ignored = ignored.any(dim=1, keepdim=True)
        target = _hide(target, ignored, logits, activation)
        ignored = ignored.reshape(len(ignored), -1, *logits.shape[2:])
        mask = (~ignored).to(torch.float32)
    if labelled is not None or sample_weights is not None:
        weights = weights_of_samples(labelled, sample_weights, logits, owner, validate=validate)
    if mask is not None:
        # Nothing to be wrong about would count as perfect and lower the mean of the others.
        known = mask.flatten(1).amax(1).to(logits.device)
        weights = known if weights is None else known * weights
    if labelled is not None and fits:
        missing = ~labelled.to(target.device).reshape(-1, *[1] * (target.ndim - 1))
        target = _hide(target, missing, logits, activation)
    channels = as_channels(target, logits, activation, owner=owner, validate=validate)
    return Reference(channels, mask, weights)


def read_target(step: Step) -> dict[str, Any]:
    """Return what a step says of its target, as the losses that read one take it.

    Args:
        step: The step.

    Returns:
        Target, which samples have one, their weights, and whether values are checked.
    """
    return {
        "target": step.target,
        "labelled": step.labelled,
        "sample_weights": step.sample_weights,
        "validate": step.validate,
    }


def enlarged(step: Step) -> Step:
    """Bring all logits of a step to the target's size, if that is finer.

    Args:
        step: The step.

    Returns:
        The step; as it came where sizes are equal, and where a term will refuse them.
    """
    axes = step.student.ndim - 2
    if step.teacher is not None and step.teacher.ndim != step.student.ndim:
        return step
    size = () if step.target is None else tuple(step.target.shape[-axes:])
    if not size or any(new < old for new, old in zip(size, step.student.shape[2:], strict=True)):
        return step
    return replace(
        step,
        student=resize(step.student, size),
        teacher=None if step.teacher is None else resize(step.teacher, size),
        members=tuple((resize(logits, size), share) for logits, share in step.members),
    )


def labelled_only(step: Step, labelled: Tensor, owner: str) -> Step:
    """Reduce a step to the samples that have a reference, for whoever knows of no others.

    Args:
        step: The step.
        labelled: Which samples have a reference, boolean `(B,)`.
        owner: Name of the term, for messages.

    Returns:
        A step of the labelled samples alone, whatever it holds of each sample.

    Raises:
        ShapeMismatchError: If there is not one value per sample.
        ObjectiveError: If the mask is not boolean, or a weight is negative or not finite.

    Example:
        >>> step = Step(torch.zeros(3, 2, 4))
        >>> labelled_only(step, torch.tensor([True, False, True]), "t").student.shape
        torch.Size([2, 2, 4])
    """
    weights_of_samples(labelled, step.sample_weights, step.student, owner, validate=False)
    names = [field.name for field in fields(step)]
    return Step(**{name: _rows(getattr(step, name), labelled) for name in names})


def _rows(value: Any, chosen: Tensor) -> Any:
    """Samples of whatever is made of tensors with the batch first."""
    if isinstance(value, Tensor):
        batched = value.ndim > 0 and len(value) == len(chosen)
        return value[chosen.to(value.device)] if batched else value
    if isinstance(value, Mapping):
        return {key: _rows(entry, chosen) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        parts = [_rows(entry, chosen) for entry in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _hide(target: Tensor, hidden: Tensor, logits: Tensor, activation: Activation) -> Tensor:
    """Put a valid value where nothing is read: whatever stands there may be anything."""
    valid = torch.zeros_like(target)
    if activation == "softmax" and target.shape == logits.shape:
        valid[:, 0] = 1
    return torch.where(hidden, valid, target)


def weights_of_samples(
    labelled: Tensor | None,
    sample_weights: Tensor | None,
    logits: Tensor,
    owner: str,
    *,
    validate: bool = True,
) -> Tensor | None:
    """Return the weight of each sample, zero for those without a reference.

    Args:
        labelled: Which samples have a reference, boolean `(B,)`; None where all have.
        sample_weights: Weight of each sample, `(B,)`, or None.
        logits: `(B, C, *spatial)`.
        owner: Name of the term or function, for messages.
        validate: Whether to check values as well as shapes.

    Returns:
        `(B,)` on the logits' device; None where all samples are alike.

    Raises:
        ShapeMismatchError: If there is not one value per sample.
        ObjectiveError: If the mask is not boolean, or a weight is negative or not finite.
    """
    for name, given in (("labelled", labelled), ("sample_weights", sample_weights)):
        if given is not None and tuple(given.shape) != (len(logits),):
            raise ShapeMismatchError(
                f"{owner}: `{name}` is {tuple(given.shape)} for a batch of {len(logits)}. Pass one "
                "value per sample."
            )
    if labelled is not None and labelled.dtype != torch.bool:
        raise ObjectiveError(
            f"{owner}: `labelled` is {labelled.dtype}; pass a boolean mask, labelled.bool()."
        )
    known = None if labelled is None else labelled.to(logits.device)
    if sample_weights is None:
        return None if known is None else known.to(torch.float32)
    weights = sample_weights.to(logits.device)
    if known is not None:
        # Nothing is read of samples without a reference, not even a weight that is NaN.
        weights = torch.where(known, weights, torch.zeros_like(weights))
    valid = not validate or weights.is_meta or bool((weights.isfinite() & (weights >= 0)).all())
    if not valid:
        raise ObjectiveError(
            f"{owner}: `sample_weights` is {weights.tolist()}; weights must be finite and not "
            "negative."
        )
    return weights


def as_channels(
    target: Tensor, logits: Tensor, activation: Activation, *, owner: str, validate: bool
) -> Tensor:
    """Return a target with one channel per logit channel, in float32.

    Args:
        target: `(B, C, *spatial)` one-hot classes or regions; or, under softmax, a label map
            `(B, *spatial)` or `(B, 1, *spatial)` of class indices.
        logits: `(B, C, *spatial)`.
        activation: "softmax" or "sigmoid".
        owner: Name of the term or function, for messages.
        validate: Whether to check values as well as shapes.

    Returns:
        `(B, C, *spatial)` in float32.

    Raises:
        ShapeMismatchError: If the target fits none of these forms.
        ObjectiveError: If its values are no classes, no probabilities, or do not sum to one.

    Example:
        >>> labels = torch.tensor([[0, 2]])
        >>> logits = torch.zeros(1, 3, 2)
        >>> as_channels(labels, logits, "softmax", owner="t", validate=True)
        tensor([[[1., 0.],
                 [0., 0.],
                 [0., 1.]]])
    """
    check_logits(logits, activation, owner)
    if target.is_complex():
        raise ObjectiveError(
            f"{owner}: the target is {target.dtype}; expected class indices or one channel per "
            "class, in real numbers."
        )
    # Tensors on the meta device have shapes and no values.
    validate = validate and not target.is_meta
    if target.shape == logits.shape:
        return _channels(target, activation, owner, validate)
    if activation == "softmax" and _is_label_map(target, logits):
        labels = target.reshape(logits.shape[0], 1, *logits.shape[2:])
        return _one_hot(labels, logits.shape[1], owner, validate)
    forms = f"{tuple(logits.shape)}"
    if activation == "softmax":
        forms += f" (one-hot), or a label map {(logits.shape[0], *logits.shape[2:])}"
    raise ShapeMismatchError(
        f"{owner}: the logits are {tuple(logits.shape)}, the target is {tuple(target.shape)}; with "
        f"{activation} the target must be {forms}. Targets are never resized; where they are "
        "finer than the logits, the term's option resize='logits' enlarges the logits."
    )


def _is_label_map(target: Tensor, logits: Tensor) -> bool:
    spatial = tuple(logits.shape[2:])
    batch = logits.shape[0]
    return tuple(target.shape) in ((batch, *spatial), (batch, 1, *spatial))


def _channels(target: Tensor, activation: Activation, owner: str, validate: bool) -> Tensor:
    target = target.float()
    if validate:
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
                f"{total.max().item():g}, but softmax classes exclude each other and must sum to "
                "1. For overlapping regions pass activation='sigmoid'; otherwise add the "
                "background channel."
            )
    return target


def _one_hot(labels: Tensor, classes: int, owner: str, validate: bool) -> Tensor:
    indices = labels.long()
    if validate:
        values = torch.unique(labels if labels.is_floating_point() else indices)
        wrong = values[(values < 0) | (values >= classes) | (values != values.trunc())]
        if wrong.numel():
            found = [round(value, 4) for value in wrong[:5].tolist()]
            raise ObjectiveError(
                f"{owner}: the label map holds {found}, but the logits have classes 0 to "
                f"{classes - 1}. Map the labels to class indices first."
            )
    shape = (labels.shape[0], classes, *labels.shape[2:])
    return torch.zeros(shape, device=labels.device).scatter_(1, indices, 1.0)
