"""What terms read from a step: activation, teacher's logits and features."""

from torch import Tensor

from privdistill.exceptions import LayerNotFoundError, ObjectiveError, ShapeMismatchError
from privdistill.losses.functional import Activation, mix_logits
from privdistill.step import Step, TapPair


def resolve(own: Activation | None, step: Step) -> Activation:
    """Return a term's own activation, or the wrapper's.

    Args:
        own: The term's option.
        step: The step, which carries the wrapper's.

    Returns:
        "softmax" or "sigmoid".
    """
    return own or ("sigmoid" if step.activation == "sigmoid" else "softmax")


def teacher_logits(
    step: Step, activation: Activation, *, term: str, temperature: float = 1.0
) -> Tensor:
    """Return the teacher's logits, detached, after comparing their shape with the student's.

    Args:
        step: The step.
        activation: "softmax" or "sigmoid".
        term: Name of the term, for messages.
        temperature: With several teachers, at which their probabilities are averaged.

    Returns:
        `(B, C, *spatial)`.

    Raises:
        ObjectiveError: If the step has none.
        ShapeMismatchError: If they differ from the student's in shape.
    """
    if step.teacher is None:
        raise ObjectiveError(f"{term}: the step has no teacher logits.")
    if step.teacher.shape != step.student.shape:
        raise ShapeMismatchError(
            f"{term}: the student's logits are {tuple(step.student.shape)}, the teacher's "
            f"{tuple(step.teacher.shape)}. Both networks must predict the same classes at the same "
            "resolution."
        )
    if step.members:
        return mix_logits(step.members, activation, temperature=temperature).detach()
    return step.teacher.detach()


def tap_pair(step: Step, tap: str, term: str) -> TapPair:
    """Return the features captured under a tap's name.

    Args:
        step: The step.
        tap: Name of the tap.
        term: Name of the term, for the message.

    Returns:
        Student and teacher features.

    Raises:
        LayerNotFoundError: If the step carries no such tap.
    """
    if tap not in step.taps:
        raise LayerNotFoundError(
            f"{term}: this step has no tap '{tap}'; it has {sorted(step.taps) or 'none'}. Name it "
            "in the wrapper: taps={'" + tap + "': Tap(teacher=..., student=...)}."
        )
    return step.taps[tap]
