"""What a loop of somebody else trains of a wrapper, and logs of a step."""

from torch import Tensor, nn

from privdistill.exceptions import LifecycleError
from privdistill.step import Output
from privdistill.wrapper import DistillationWrapper


def to_train(kd: DistillationWrapper) -> list[nn.Parameter]:
    """Return what an optimizer trains.

    Args:
        kd: The wrapper.

    Returns:
        Parameters of student, adapters and terms, then those of a teacher that learns.
    """
    try:
        teacher = [weight for weight in kd.teacher_parameters() if weight.requires_grad]
    except LifecycleError:
        teacher = []  # it is frozen
    return [*kd.parameters(), *teacher]


def values(out: Output) -> dict[str, Tensor]:
    """Return the loss, detached, and every term, unweighted, by name.

    Args:
        out: What a step of the wrapper returned.

    Returns:
        Scalars; first "loss".
    """
    return {"loss": out.loss.detach(), **out.terms}


def finest(out: Output) -> Tensor:
    """Return the student's logits, of several heads the first, which is the finest.

    Args:
        out: What a step of the wrapper returned.

    Returns:
        (B, C, *spatial).
    """
    return out.student[0] if isinstance(out.student, list) else out.student
