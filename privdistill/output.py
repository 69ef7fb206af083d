"""What passes through a step: terms read a `Step`, the user gets an `Output`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from privdistill.exceptions import ShapeMismatchError


class TapPair(NamedTuple):
    """The activations captured under one tap name.

    Attributes:
        student: Student features after the tap's adapter, `(B, C, *spatial)`, with their graph.
        teacher: Teacher features of the same shape, without gradient.
    """

    student: Tensor
    teacher: Tensor


@dataclass(frozen=True)
class Step:
    """Everything a term may read in one training step.

    A term takes what it needs, so masks and schedules reach it without new signatures.

    Attributes:
        student: Student logits, `(B, C, *spatial)`, before sigmoid or softmax.
        teacher: Teacher logits of the same shape, or None where no term needs them.
        target: Reference as the user passed it, or None.
        taps: Captured activations by tap name.
        activation: "softmax" (exclusive classes) or "sigmoid" (overlapping regions); a term's own
            option wins.
        index: Number of training steps taken before this one, a scalar on the device.
        validate: Whether values (not only shapes) are checked in this step; such checks make a
            GPU wait.
    """

    student: Tensor
    teacher: Tensor | None = None
    target: Tensor | None = None
    taps: dict[str, TapPair] = field(default_factory=dict)
    activation: str = "softmax"
    index: Tensor | int = 0
    validate: bool = True


class Output(NamedTuple):
    """What a call of the wrapper returns. A named tuple, so that DDP and Fabric can walk it.

    Attributes:
        loss: The objective, a scalar, in float32 unless the networks are float64.
        terms: Every term by name, unweighted and detached.
        student: Student logits, `(B, C, *spatial)`.
        teacher: Teacher logits, or None where the objective needs none.
        taps: Captured activations by tap name; owned by this output, pinned nowhere else.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    student: Tensor
    teacher: Tensor | None
    taps: dict[str, TapPair]


def first_logits(output: Any) -> Tensor:
    """Find the logits in what a network returned.

    A tensor is taken as it is; of a mapping the entry "out" or "logits"; of an object the attribute
    `logits`; of a tuple or list the first entry, which is the finest resolution under deep
    supervision.

    Args:
        output: What the forward pass returned.

    Returns:
        `(B, C, *spatial)`.

    Raises:
        ShapeMismatchError: If no tensor with a spatial axis can be found.

    Example:
        >>> import torch
        >>> first_logits({"out": torch.zeros(1, 2, 8, 8), "aux": torch.zeros(1, 2, 8, 8)}).shape
        torch.Size([1, 2, 8, 8])
    """
    if isinstance(output, Tensor) and output.ndim >= 3:
        return output
    inner = _inner(output)
    if inner is None:
        shape = f" of shape {tuple(output.shape)}" if isinstance(output, Tensor) else ""
        raise ShapeMismatchError(
            f"The network returned a {type(output).__name__}{shape}; expected logits "
            "(B, C, *spatial), a mapping with 'out' or 'logits', an object with .logits, or a "
            "tuple or list that begins with them. Otherwise pass `select_logits=` to the "
            "wrapper, a function from the output to the logits."
        )
    return first_logits(inner)


def _inner(output: Any) -> Any:
    if isinstance(output, Mapping):
        return output.get("out", output.get("logits"))
    if hasattr(output, "logits"):
        return output.logits
    if isinstance(output, tuple | list) and output:
        return output[0]
    return None
