"""Deep supervision: a step for each of the student's heads."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from privdistill.exceptions import ObjectiveError, ShapeMismatchError
from privdistill.losses.functional import Activation, mix_logits, resize
from privdistill.losses.options import is_number
from privdistill.step import Step


def head_weights(given: Sequence[float] | None, count: int) -> list[float]:
    """Return the weight of each head under deep supervision, summing to one.

    Args:
        given: What the user passed; None halves the weight from head to head.
        count: Number of heads.

    Returns:
        One weight per head.

    Raises:
        ShapeMismatchError: If there is another number of heads than of weights.
        ObjectiveError: If the weights have no meaning.
    """
    weights = [0.5**index for index in range(count)] if given is None else list(given)
    # In eval mode such networks return their finest head alone.
    if count == 1:
        return [1.0]
    if len(weights) != count:
        raise ShapeMismatchError(
            f"The student returns {count} heads, and `head_weights` has {len(weights)}: {weights}. "
            "Pass one weight per head, finest first."
        )
    numbers = all(is_number(weight) and 0 <= weight < float("inf") for weight in weights)
    if not numbers or not 0 < sum(weights) < float("inf"):
        raise ObjectiveError(
            f"`head_weights` is {weights}; weights must be finite, not negative and not all zero."
        )
    return [weight / sum(weights) for weight in weights]


def check_head_weights(given: Sequence[float] | None, count: int) -> None:
    """Check weights against the heads that the student returns in train mode.

    Args:
        given: What the user passed.
        count: Number of heads.

    Raises:
        ShapeMismatchError: If there is another number of heads than of weights.
        ObjectiveError: If the weights have no meaning.
    """
    if given is not None and count == 1 < len(given):
        raise ShapeMismatchError(
            f"`head_weights` has {len(given)}, but the student returns one head in train mode, or "
            "others in a form that is not understood: expected a list, stacked heads, or 'aux' "
            "entries. `select_logits=` may return a list."
        )
    head_weights(given, count)


def check_heads(student: Tensor, teachers: Sequence[Tensor]) -> None:
    """Compare the shapes of all networks' logits for the example.

    Args:
        student: Logits of the student, `(B, C, *spatial)`; of several heads the finest.
        teachers: Those of each teacher.

    Raises:
        ShapeMismatchError: If they differ.
    """
    for teacher in teachers:
        if student.shape != teacher.shape:
            raise ShapeMismatchError(
                f"The objective compares logits, but for the example the student gives "
                f"{tuple(student.shape)} and the teacher {tuple(teacher.shape)}. Both must predict "
                "the same classes at the same resolution; pass `select_logits=` if another output "
                "is the one to compare."
            )


def steps_by_head(
    common: Mapping[str, Any],
    heads: Sequence[Tensor],
    taught: Sequence[Sequence[Tensor]],
    shares: Sequence[float | Tensor],
) -> list[Step]:
    """Return a step for each head, with the teachers' logits at its resolution.

    Args:
        common: Fields that the steps have in common; their activation says how logits of several
            teachers are averaged.
        heads: The student's logits, finest first, `(B, C, *spatial)`.
        taught: Each teacher's heads.
        shares: Share of each teacher in the mean.

    Returns:
        Steps in the order of the heads.
    """
    steps = []
    for head in heads:
        main = head is heads[0]
        teaching = _teaching(head, taught, shares, common["activation"], main=main)
        steps.append(Step(student=head, **common, **teaching))
    return steps


def _teaching(
    head: Tensor,
    taught: Sequence[Sequence[Tensor]],
    shares: Sequence[float | Tensor],
    activation: Activation,
    *,
    main: bool,
) -> dict[str, Any]:
    if not taught:
        return {}
    # A single teacher's logits stay what it gave, bit by bit.
    if len(taught) == 1:
        return {"teacher": _at_resolution(taught[0], head, main)}
    own = [_at_resolution(heads, head, main) for heads in taught]
    members = tuple(zip(own, shares, strict=True))
    return {"teacher": mix_logits(members, activation), "members": members}


def _at_resolution(heads: Sequence[Tensor], like: Tensor, main: bool) -> Tensor:
    for head in heads:
        if head.shape[2:] == like.shape[2:]:
            return head
    # The main head is never met half-way: networks of other resolutions are a mistake.
    return heads[0] if main else resize(heads[0], like.shape[2:])
